"""Finds the answers in a rendered conversation.

A mark is put into every message, a character that is not assigned in Unicode, and the marked conversation is rendered
too. If it is the same text except for the marks, they show where each message is. Rendering only the first messages
does not work, because some templates render earlier turns differently (docs/decisions/0034). This module works on text
only; all it needs of a template is in `TemplateTraits`.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

Messages = list[dict[str, Any]]

# Planes 4 to 13 of Unicode. No character is assigned there, so no template trims, splits at or escapes one.
_UNASSIGNED = range(0x40000, 0xE0000)
_MARK = re.compile("[\U00040000-\U000dffff]")


class Span(NamedTuple):
    """An answer as the model would generate it: the characters [start, end), and whether a control token ends it."""

    start: int
    end: int
    closed: bool


@dataclass(frozen=True)
class TemplateTraits:
    """What a chat template writes around an answer.

    `prompts`: the generation prompts that it can write, the server's default first.
    `cuts`: where the first prompt can be cut between tokens, the longest piece first.
    `bridge`: what is between a question and its answer, if the template has no generation prompt.
    `text_closing`, `call_closing`: the control tokens behind a last answer, of text or of tool calls.
    `literal`: what is written behind a last answer, if that has no control token.
    `headers`, `call_headers`: control tokens of a message's header. They do not end an answer, unless the model stops
    at them. `call_headers` lacks those that also follow the name in a tool call.
    `controls`: matches any control token. `stops`: the control tokens at which the model stops.
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
    """`count` characters that do not occur in the text; fewer only if there are no more."""
    used = set(_MARK.findall(text))
    return list(islice((c for c in map(chr, _UNASSIGNED) if c not in used), count))


def insert_marks(messages: Messages, marks: Sequence[str], *, answers_only: bool = False) -> Messages:
    """The messages with one mark each: in the name of the last tool call, else before the last visible character.

    The mark is inside the text, so that a template which trims the text or checks its beginning renders it as before.
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
    """(position in `text`, number of the message) of every mark, in order; None if the marks changed other text."""
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
    """Where an answer begins (`at`), and whether the whole prompt that a server sends is before it (`whole`)."""

    at: int
    whole: bool


class AmbiguousAnswer(Exception):
    """The place of an answer in the text is not known. `index`: the number of the message."""

    def __init__(self, index: int, why: str) -> None:
        super().__init__(why)
        self.index = index


@dataclass(frozen=True)
class Conversation:
    """A rendered conversation, and the (position, number of the message) of the marks in it."""

    text: str
    messages: Messages
    positions: list[tuple[int, int]]
    traits: TemplateTraits

    def find_answers(self, turns: Sequence[int], border: Border | None) -> list[Answer]:
        """The trained turns in order.

        Args:
            turns: numbers of the messages; the last of them is the last message.
            border: where the last answer begins; None = the text does not begin with any prompt that a server sends.

        Raises:
            AmbiguousAnswer: the place of one of them is not known.
        """
        floor, found = 0, list[Answer]()
        for index in turns:
            at = self._position(index)
            floor = max(floor, self._find_floor(at, index))
            start, whole = self._start(index, floor, at, border if index == turns[-1] else None)
            end, closed = self._end(index, at)
            # The full prompt is known only for the last answer. For the others only its end can be compared.
            whole = whole and (border is not None or index != turns[-1] or index == 0)
            found.append(Answer(Span(start, end, closed), whole, self._left_out(index, floor, end)))
            floor = end
        return found

    def _position(self, index: int) -> int:
        """The position of the last visible character of a message, or of the name of its last tool call."""
        at = self._first.get(index)
        if at is None:
            what = "tool calls do" if self.messages[index].get("tool_calls") else "content does"
            raise AmbiguousAnswer(index, f"its {what} not reach the text that the base model's chat template makes.")
        return at

    @cached_property
    def _first(self) -> dict[int, int]:
        return {number: at for at, number in reversed(self.positions)}

    def _find_floor(self, at: int, index: int) -> int:
        """The position behind the last mark of an earlier message, before which this message cannot begin."""
        before = range(bisect_left(self.positions, (at, -1)) - 1, -1, -1)
        return next((self.positions[i][0] + 1 for i in before if self.positions[i][1] != index), 0)

    def _find_ceiling(self, at: int, index: int) -> int:
        """The position of the next message's mark. Control tokens before it are the template's own."""
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
            why = "its beginning in the text that the base model's chat template makes cannot be found."
            raise AmbiguousAnswer(index, why)
        # Not whole if there are prompts, because a server sends one before each answer and this text has none there:
        # the template has merged two answers.
        return Border(content, not self.traits.prompts[0] and not self.text[floor:content].strip())

    def _behind_header(self, border: Border | None) -> Border | None:
        """The border moved behind a header, if there is one.

        Some templates leave the header out of the prompt in some cases. The model should still not learn to write it.
        """
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
        """Where the content of a message begins, if the text contains it unchanged."""
        message = self.messages[index]
        content = (message["content"] or "").strip()
        start = at + 1 - len(content)
        return start if start >= 0 and not message.get("tool_calls") and self.text.startswith(content, start) else None

    def _end(self, index: int, at: int) -> tuple[int, bool]:
        """Where an answer ends, and whether a control token ends it. The token belongs to the answer."""
        ceiling, calls = self._find_ceiling(at, index), bool(self.messages[index].get("tool_calls"))
        found = list(self.traits.controls.finditer(self.text, at + 1, ceiling))
        last = ceiling == len(self.text)
        if end := self._closing(found, calls, last=last):
            return end, True
        if not calls:
            return self._content_end(index, at), False
        if not last and not (found and not self.traits.call_closing):
            why = "the end of its tool calls in the text that the base model's chat template makes cannot be found."
            raise AmbiguousAnswer(index, why)
        # This template has no token that ends calls, so the next control token belongs to the next message.
        return len(self.text[: found[0].start() if found else ceiling].rstrip()), False

    def _closing(self, found: list[re.Match[str]], calls: bool, *, last: bool) -> int | None:
        """The end of the control token that ends an answer, or None.

        That is a token at which the model stops, or else the tokens with which the template ends a last answer.
        """
        headers, own = self.traits.call_headers if calls else self.traits.headers, list[re.Match[str]]()
        for match in found:
            if match.group() in self.traits.stops:
                return match.end()
            if match.group() in headers:  # the next message begins here; a blank one has no mark that would show it
                break
            own.append(match)
        closing, end = (self.traits.call_closing if calls else self.traits.text_closing), None
        for match, wanted in zip(own, closing, strict=False):
            if match.group() != wanted:
                break
            end = match.end()
        if end is None and last and own and not self.text[own[-1].end() :].strip():
            return own[-1].end()
        # If there is only one control token before the next message, it is that message's header and ends nothing.
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
