"""Where the answers lie in a rendered conversation: found in its one full text, whatever prefixes would have rendered.

Every message is marked with a character that no honest text has, the marked conversation is rendered too, and if it is
the real text but for the marks, they say where in the real text each message ended up. Pure text: knows nothing of
tokenizers, and of templates only what `TemplateTraits` says.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

Messages = list[dict[str, Any]]

# Planes 4 to 13 of Unicode: nothing was ever assigned there, and no template trims, splits at or escapes what is.
_UNASSIGNED = range(0x40000, 0xE0000)
_MARK = re.compile("[\U00040000-\U000dffff]")


class Span(NamedTuple):
    """An answer as it would be generated: the characters [start, end), and whether a control token ends it."""

    start: int
    end: int
    closed: bool


@dataclass(frozen=True)
class TemplateTraits:
    """What a chat template does around an answer.

    `prompts`: the generation prompts it can write, the one that a server sends first. `cuts`: where the first of them
    can be cut between tokens, the longest piece first. `bridge`: where it writes none, what stands between a question
    and its answer. `text_closing`, `call_closing`: the control tokens that it
    writes after a last answer. `literal`: what it writes there if that has no control token. `headers`,
    `call_headers`: control tokens of a message's header, which end no answer unless the model stops at them; the second
    without those that a call has behind its name too.
    """

    prompts: tuple[str, ...]
    cuts: tuple[int, ...]
    bridge: str
    text_closing: tuple[str, ...]
    call_closing: tuple[str, ...]
    literal: str
    headers: frozenset[str]
    call_headers: frozenset[str]
    controls: re.Pattern[str]
    stops: frozenset[str]


# --- marks ---------------------------------------------------------------------------------------


def choose_marks(text: str, count: int) -> list[str]:
    """So many characters that the text does not have; fewer only if there are no more."""
    used = set(_MARK.findall(text))
    return list(islice((c for c in map(chr, _UNASSIGNED) if c not in used), count))


def insert_marks(messages: Messages, marks: Sequence[str], *, answers_only: bool = False) -> Messages:
    """The messages with one mark each: in the name of the last tool call, else before the last visible character.

    Inside of the text, so that a template that trims it or asks how it begins sees no difference.
    """
    return [
        _marked(message, mark) if message["role"] == "assistant" or not answers_only else message
        for message, mark in zip(messages, marks, strict=True)
    ]


def _marked(message: dict[str, Any], mark: str) -> dict[str, Any]:
    if calls := message.get("tool_calls"):
        function = calls[-1]["function"]
        named = {**function, "name": f"{function['name'][:-1]}{mark}{function['name'][-1:]}"}
        return {**message, "tool_calls": [*calls[:-1], {**calls[-1], "function": named}]}
    content = message["content"] or ""
    end = len(content.rstrip())
    return {**message, "content": f"{content[: end - 1]}{mark}{content[end - 1 :]}"} if end else message


def find_marks(text: str, with_marks: str, marks: Sequence[str]) -> list[tuple[int, int]] | None:
    """(position in `text`, number of the message) of every mark, in order; None if the marks changed the text."""
    if with_marks.translate(dict.fromkeys(map(ord, marks))) != text:
        return None
    numbers = {mark: number for number, mark in enumerate(marks)}
    found = [match for match in _MARK.finditer(with_marks) if match.group() in numbers]
    return [(match.start() - before, numbers[match.group()]) for before, match in enumerate(found)]


# --- where an answer begins and ends -------------------------------------------------------------


class Answer(NamedTuple):
    """A trained turn: `whole` as for its `Border`, `left_out` if the template leaves some of its content out."""

    span: Span
    whole: bool
    left_out: bool


class Border(NamedTuple):
    """Where an answer begins, and whether all of the prompt that a server sends stands before it."""

    at: int
    whole: bool


class AmbiguousAnswer(Exception):
    """An answer that cannot be told apart: the number of the message, and why in words."""

    def __init__(self, index: int, why: str) -> None:
        super().__init__(why)
        self.index = index


@dataclass(frozen=True)
class Conversation:
    """A rendered conversation and the places of its messages in it."""

    text: str
    messages: Messages
    positions: list[tuple[int, int]]
    traits: TemplateTraits

    def answers(self, turns: Sequence[int], border: Border | None) -> list[Answer]:
        """The trained turns in order.

        Args:
            turns: numbers of the messages; the last of them is the last message.
            border: None = nothing that a server sends is the beginning of this text.

        Raises:
            Lost: one of them.
        """
        floor, found = 0, list[Answer]()
        for index in turns:
            at = self._position(index)
            floor = max(floor, self._find_floor(at, index))
            start, whole = self._start(index, floor, at, border if index == turns[-1] else None)
            end, closed = self._end(index, at)
            # What a server sends for the last answer is known, and for the others only how it ends.
            whole = whole and (border is not None or index != turns[-1] or index == 0)
            found.append(Answer(Span(start, end, closed), whole, self._left_out(index, floor, end)))
            floor = end
        return found

    def _position(self, index: int) -> int:
        """Where the last visible character of a message, or of its last call's name, is."""
        at = self._first.get(index)
        if at is None:
            what = "tool calls do" if self.messages[index].get("tool_calls") else "content does"
            raise AmbiguousAnswer(index, f"its {what} not reach the text that the base model's chat template makes.")
        return at

    @cached_property
    def _first(self) -> dict[int, int]:
        return {number: at for at, number in reversed(self.positions)}

    def _find_floor(self, at: int, index: int) -> int:
        """Where what stands before a message ends, as far as it was marked."""
        before = range(bisect_left(self.positions, (at, -1)) - 1, -1, -1)
        return next((self.positions[i][0] + 1 for i in before if self.positions[i][1] != index), 0)

    def _find_ceiling(self, at: int, index: int) -> int:
        """A place in the next message, before which only the template's own words have control tokens."""
        after = range(bisect_right(self.positions, (at, index)), len(self.positions))
        return next((self.positions[i][0] for i in after if self.positions[i][1] != index), len(self.text))

    def _start(self, index: int, floor: int, at: int, border: Border | None) -> Border:
        bridge, content = self.traits.bridge, self._content_start(index, at)
        if not self.traits.prompts[0] and bridge and self.text.startswith(bridge, floor):
            start = floor + len(bridge)
            return Border(start, border is None or border.at == start)
        if found := self._behind_header(border) or self._after_prompt(floor, at):
            return found
        if content is None:
            why = "where it begins in the text that the base model's chat template makes cannot be told."
            raise AmbiguousAnswer(index, why)
        # A server sends the prompt before each answer, so it is missed where the template merges two of them.
        return Border(content, not self.traits.prompts[0] and not self.text[floor:content].strip())

    def _behind_header(self, border: Border | None) -> Border | None:
        """A prompt that leaves its header out in some states does not make the header the model's to write."""
        prompt = self.traits.prompts[0]
        if border is None or not prompt or not self.text.startswith(prompt, border.at):
            return border
        return Border(border.at + len(prompt), False)

    def _after_prompt(self, floor: int, at: int) -> Border | None:
        for number, prompt in enumerate(self.traits.prompts):
            if prompt and (found := self.text.find(prompt, floor, at + 1)) >= 0:
                return Border(found + len(prompt), number == 0)
        for cut in self.traits.cuts:
            piece = self.traits.prompts[0][:cut]
            if piece.strip() and (found := self.text.find(piece, floor, at + 1)) >= 0:
                return Border(found + cut, False)
        return None

    def _content_start(self, index: int, at: int) -> int | None:
        """Where the content of a message begins, if it is in the text as it was written."""
        message = self.messages[index]
        content = (message["content"] or "").strip()
        start = at + 1 - len(content)
        return start if start >= 0 and not message.get("tool_calls") and self.text.startswith(content, start) else None

    def _end(self, index: int, at: int) -> tuple[int, bool]:
        """Where an answer ends, after the token that ends it if there is one, and whether there is."""
        ceiling, calls = self._find_ceiling(at, index), bool(self.messages[index].get("tool_calls"))
        found = list(self.traits.controls.finditer(self.text, at + 1, ceiling))
        last = ceiling == len(self.text)
        if end := self._closing(found, calls, last=last):
            return end, True
        if not calls:
            return self._content_end(index, at), False
        if not last and not (found and not self.traits.call_closing):
            why = "where its tool calls end in the text that the base model's chat template makes cannot be told."
            raise AmbiguousAnswer(index, why)
        # No token ends calls here, so the next one is the next message's.
        return len(self.text[: found[0].start() if found else ceiling].rstrip()), False

    def _closing(self, found: list[re.Match[str]], calls: bool, *, last: bool) -> int | None:
        """The end of the control token that ends an answer: one to stop at, or as the template ends a last answer."""
        headers, own = self.traits.call_headers if calls else self.traits.headers, list[re.Match[str]]()
        for match in found:
            if match.group() in self.traits.stops:
                return match.end()
            if match.group() in headers:  # of the next message, which has no mark if it is blank
                break
            own.append(match)
        closing, end = (self.traits.call_closing if calls else self.traits.text_closing), None
        for match, wanted in zip(own, closing, strict=False):
            if match.group() != wanted:
                break
            end = match.end()
        if end is None and last and own and not self.text[own[-1].end() :].strip():
            return own[-1].end()
        # The only control token before the next message is that message's own.
        return own[0].end() if end is None and closing and own and len(found) > 1 and not calls else end

    def _content_end(self, index: int, at: int) -> int:
        content = self.messages[index]["content"] or ""
        space = content[len(content.rstrip()) :]
        end = at + 1 + (len(space) if self.text.startswith(space, at + 1) else 0)
        literal = self.traits.literal
        return end + len(literal) if literal and self.text.startswith(literal, end) else end

    def _left_out(self, index: int, floor: int, end: int) -> bool:
        """Whether some of a message's content is not in its turn; white space does not count."""
        content = "".join((self.messages[index]["content"] or "").split())
        return content not in "".join(self.text[floor:end].split())
