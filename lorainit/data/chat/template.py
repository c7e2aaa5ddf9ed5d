"""From one row to its text and the positions of its answers, for any chat template.

The template's source is not analyzed. Instead a row is rendered three times: unchanged, with marks that show where its
messages are in the text (`turns`), and up to its last answer with a generation prompt, as a server will send it.
"""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lorainit.config.errors import UnsupportedModel
from lorainit.data.chat import rendering, tokenizer_time
from lorainit.data.chat.turns import (
    AmbiguousAnswer,
    Border,
    Conversation,
    Messages,
    Span,
    TemplateTraits,
    choose_marks,
    find_marks,
    insert_marks,
)
from lorainit.data.formats.conversation import Fault, is_trained
from lorainit.system.host_failure import is_host_failure

_PROBE = "zq_probe"
_PROBE_TOOL = {"type": "function", "function": {"name": _PROBE, "description": "", "parameters": {}}}
_PROBE_CALL = {"id": "call00000", "type": "function", "function": {"name": _PROBE, "arguments": {}}}
_ASKED = {"role": "user", "content": "a"}
_ANSWERED = {"role": "assistant", "content": _PROBE}
_CALLED = {"role": "assistant", "content": "", "tool_calls": [_PROBE_CALL]}
_WEIGHTLESS = ("weight", "function_call")
# Options that change the prompt of a model that thinks. First the default of a server.
_THINKING: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": False}, {"enable_thinking": True})
# After so many rows that exceed a limit the template is refused, because each of them costs seconds.
_MAX_UNBOUNDED_ROWS = 3


_DIFFERS = (
    "the prompt that a server sends for this answer differs from the text before it in the rendered conversation; a"
    " model that thinks may have to be asked with other options (enable_thinking)."
)
_LEFT_OUT = "the chat template leaves some of the content out (often the thinking of earlier turns): it is not trained."


@dataclass(frozen=True)
class Rendered:
    """The text, the trained answers in it in order, and warnings for the owner of the row."""

    text: str
    spans: tuple[Span, ...]
    warnings: tuple[Fault, ...] = ()


class Template:
    """A tokenizer's chat template. What it supports is found out by rendering small conversations.

    Args:
        stops: ids of the tokens at which the model stops (`lorainit.data.chat.stops`).
    """

    def __init__(self, tokenizer: Any, *, stops: frozenset[int] = frozenset()) -> None:
        self.tokenizer = tokenizer
        self.stops = stops
        self._unbounded_rows = 0
        self._arguments_as_text = self._content_as_parts = False

    def render(self, value: dict[str, Any]) -> Rendered | Fault:
        """A normalized chat row up to its last trained turn, or the row's fault.

        A span is what the model has to generate behind the generation prompt: content, tool calls and the end-of-turn
        token, without the template's white space after it.

        Raises:
            UnsupportedModel: there is no template, it must not be run, or it has exceeded a limit of `rendering` in
                `_MAX_UNBOUNDED_ROWS` rows.
        """
        _ = self._required
        messages, tools = value["messages"], value["tools"]
        last = max(i for i, m in enumerate(messages) if is_trained(m))
        options = {"tools": tools or None}
        if "parallel_tool_calls" in value:
            options["parallel_tool_calls"] = value["parallel_tool_calls"]
        try:
            return self._tool_fault(messages, tools) or self._answers(messages[: last + 1], options)
        except rendering.RenderLimitExceeded as error:
            self._unbounded_rows += 1
            if self._unbounded_rows >= _MAX_UNBOUNDED_ROWS:
                raise
            return Fault("template_error", "messages", str(error))
        except UnsupportedModel as error:
            return Fault("template_error", "messages", str(error))

    def _answers(self, messages: Messages, options: dict[str, Any]) -> Rendered | Fault:
        text = self._text(messages, options)
        turns = [i for i, m in enumerate(messages) if is_trained(m)]
        border = self._find_border(text, messages, options)
        found = self._find_only_answer(text, messages, turns, border) or self._find_answers(text, messages, options)
        if found is None:
            why = "writes other words around a message when one of its words changes, so the answers"
            return Fault("template_error", "messages", f"the base model's chat template {why} cannot be told apart.")
        try:
            answers = Conversation(text, messages, found, self._traits).find_answers(turns, border)
        except AmbiguousAnswer as lost:
            return Fault("template_error", f"messages[{lost.index}]", f"messages[{lost.index}]: {lost}")
        warnings = dict[str, Fault]()
        for index, answer in zip(turns, answers, strict=True):
            if not answer.whole:
                warnings.setdefault("prompt_differs", Fault("prompt_differs", f"messages[{index}]", _DIFFERS))
            if answer.left_out:
                warnings.setdefault("content_left_out", Fault("content_left_out", f"messages[{index}]", _LEFT_OUT))
        return Rendered(text, tuple(answer.span for answer in answers), tuple(warnings.values()))

    def _find_only_answer(
        self, text: str, messages: Messages, turns: list[int], border: Border | None
    ) -> list[tuple[int, int]] | None:
        """As `_find_answers`, for a row with one trained answer that follows its prompt word for word.

        No marks are needed then, which saves one rendering. None = there are several answers, or the answer's text does
        not follow the prompt, or occurs twice.
        """
        content = (messages[-1]["content"] or "").strip()
        if len(turns) > 1 or border is None or not next(iter(self._prompts)) or messages[-1].get("tool_calls"):
            return None
        tail = text[border.at :].lstrip()
        if not content or not tail.startswith(content) or tail.count(content) > 1:
            return None
        return [(len(text) - len(tail) + len(content) - 1, turns[0])]

    def _find_answers(self, text: str, messages: Messages, options: dict[str, Any]) -> list[tuple[int, int]] | None:
        marks = choose_marks(text, len(messages))
        if len(marks) < len(messages):
            return None
        # Some templates check how a question ends, so a mark in it changes the text. Then only the answers are marked.
        # This is safe if the prompt has a control token, since no question may contain one, or if there is no prompt.
        prompt = next(iter(self._prompts))
        for answers_only in (False, True) if self.control_tokens.search(prompt) or not prompt else (False,):
            with_marks = self._text(insert_marks(messages, marks, answers_only=answers_only), options)
            if (found := find_marks(text, with_marks, marks)) is not None:
                return found
        return None

    def _find_border(self, text: str, messages: Messages, options: dict[str, Any]) -> Border | None:
        """Where the last answer begins: at the end of the prompt that a server sends for it. None if there is none."""
        for number, thinking in enumerate(self._prompts.values()):
            sent = self._try(messages[:-1], {**options, **thinking}, prompt=True) if len(messages) > 1 else ""
            if sent and text.startswith(sent):
                return Border(len(sent), number == 0)
        return None

    def _text(self, messages: Messages, options: dict[str, Any], *, prompt: bool = False) -> str:
        clean = [{k: v for k, v in m.items() if k not in _WEIGHTLESS and v is not None} for m in messages]
        clean = [{**m, "content": m.get("content", "")} for m in clean]
        if self._arguments_as_text:
            clean = [_with_text_arguments(m) for m in clean]
        if self._content_as_parts:
            clean = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in clean]
        options = {**options, "tokenize": False, "add_generation_prompt": prompt}
        try:
            return rendering.render(lambda: str(self.tokenizer.apply_chat_template(clean, **options)))
        except UnsupportedModel:
            raise
        except Exception as error:  # whatever the template's own expressions raise
            if isinstance(error, RuntimeError) and is_host_failure(error):
                raise  # no thread could be started to watch the time, which is not the template's fault
            why = str(error) or type(error).__name__
            raise UnsupportedModel(
                f"The base model's chat template cannot render the conversation: {why}", param="model"
            ) from error

    @cached_property
    def _required(self) -> bool:
        """Check what does not depend on a row, once for all rows. Raises `UnsupportedModel`; otherwise it is true."""
        sources = self.tokenizer.chat_template
        if sources is None:
            raise UnsupportedModel(
                "The base model's chat template cannot render the conversation: it has none", param="model"
            )
        for source in sources.values() if isinstance(sources, dict) else [sources]:
            rendering.check_source(source)
        for self._content_as_parts in (False, True):  # templates of vision models may accept only lists of parts
            if self._shows_probe([_ASKED, _ANSWERED], {}):
                return True
        self._content_as_parts = False
        return True

    def check(self) -> str:
        """Render small conversations of every kind.

        Returns:
            The text of a question and its answer.

        Raises:
            RenderLimitExceeded: it takes too long, takes too much memory, or renders too much.
            UnsupportedModel: it cannot render a question and its answer, so no row could be trained.
        """
        _ = self._required
        exchange = [_ASKED, {"role": "assistant", "content": "b"}]
        text = self._text(exchange, {})
        for messages in ([_ASKED], exchange):
            for prompt in (False, True):
                self._shows_probe(messages, {}, prompt=prompt)
        _ = self.takes_tools, self.takes_calls
        return text

    # --- what the template and the tokenizer can do ----------------------------------------------

    def _tool_fault(self, messages: Messages, tools: list[Any]) -> Fault | None:
        calls = any(m.get("tool_calls") or m["role"] == "tool" for m in messages)
        if (tools and not self.takes_tools) or (calls and not self.takes_calls):
            what = "tools" if tools and not self.takes_tools else "tool calls"
            return Fault("tools_not_supported", "tools", f"the base model's chat template does not support {what}.")
        return None

    @cached_property
    def takes_tools(self) -> bool:
        """Whether tool descriptions reach the text."""
        return self._shows_probe([_ASKED], {"tools": [_PROBE_TOOL]})

    @cached_property
    def takes_calls(self) -> bool:
        """Whether an assistant's tool calls reach the text."""
        for self._arguments_as_text in (False, True):
            if self._shows_probe([_ASKED, _CALLED], {}):
                return True
        self._arguments_as_text = False
        return False

    def _shows_probe(self, messages: Messages, options: dict[str, Any], *, prompt: bool = False) -> bool:
        return _PROBE in self._try(messages, options, prompt=prompt)

    def _try(self, messages: Messages, options: dict[str, Any], *, prompt: bool = False) -> str:
        """The rendered text; "" if the template refuses the conversation."""
        try:
            return self._text(messages, options, prompt=prompt)
        except rendering.RenderLimitExceeded:
            raise
        except UnsupportedModel:
            return ""

    @cached_property
    def _prompts(self) -> dict[str, dict[str, Any]]:
        """The generation prompts that the template can write, each with the first options that give it."""
        found = dict[str, dict[str, Any]]()
        for options in _THINKING:
            found.setdefault(self._prompt(options), options)
        return found

    def _prompt(self, options: dict[str, Any]) -> str:
        without, sent = self._try([_ASKED], options), self._try([_ASKED], options, prompt=True)
        if without == sent:
            return self._standing_prompt(sent)
        alike = next((i for i, (a, b) in enumerate(zip(without, sent, strict=False)) if a != b), len(without))
        # Without a prompt some templates end the text with a token. It may begin with the same characters as the
        # prompt's first token, so the cut is moved back to the beginning of that token.
        cut = next((m.start() for m in self.control_tokens.finditer(sent) if m.start() < alike < m.end()), alike)
        return sent[cut:]

    def _standing_prompt(self, asked: str) -> str:
        """The prompt of a template that always writes it at the end of the text, also behind an answer."""
        tail = self._tail(_ANSWERED)
        end = next((m.end() for m in self.control_tokens.finditer(tail) if m.group() in self._stop_texts), len(tail))
        return tail[end:] if tail[end:].strip() and asked.endswith(tail[end:]) else ""

    def _tail(self, answer: dict[str, Any]) -> str:
        """What the template writes behind the last answer."""
        before, _, tail = self._try([_ASKED, answer], {}).rpartition(_PROBE)
        return tail if before else ""

    @cached_property
    def _bridge(self) -> str:
        """What a template without a generation prompt writes between a question and its answer."""
        _, _, sent = self._try([{**_ASKED, "content": _PROBE}], {}, prompt=True).rpartition(_PROBE)
        text = self._try([{**_ASKED, "content": _PROBE}, _ANSWERED], {})
        between = text[text.find(_PROBE) + len(_PROBE) : text.rfind(_PROBE)]
        # Text that no prompt contains is still not trained, because the template writes it and not the model. Only
        # white space that follows `sent` counts as part of the answer.
        return sent if between.startswith(sent) and not between.removeprefix(sent).strip() else between

    @cached_property
    def _traits(self) -> TemplateTraits:
        prompts = tuple(self._prompts)
        encoded = tokenizer_time.read(self.tokenizer, prompts[0], add_special_tokens=False)
        tail = self._tail(_ANSWERED)
        closing = tuple(self.control_tokens.findall(tail))
        # The first token behind an answer may be a header and still end the answer: GLM ends an answer with the header
        # of the next question, also if there is no such question.
        headers = self._headers - {token for token in closing[:1] if token not in prompts[0]}
        _, _, behind_name = self._try([_ASKED, _CALLED], {}).partition(_PROBE)
        return TemplateTraits(
            prompts=prompts,
            cuts=tuple(sorted({end for _, end in encoded.offset_mapping[:-1]}, reverse=True)),
            bridge="" if prompts[0] else self._bridge,
            text_closing=closing,
            call_closing=tuple(self.control_tokens.findall(self._tail(_CALLED))),
            literal="" if closing else tail.rstrip(),
            headers=headers,
            call_headers=headers - {*self.control_tokens.findall(behind_name)},
            controls=self.control_tokens,
            stops=frozenset(self._stop_texts),
        )

    @property
    def _headers(self) -> frozenset[str]:
        """The control tokens that begin a message, or stand right before its content."""
        found = set(self.control_tokens.findall(next(iter(self._prompts)))[-1:])
        for messages in ([{**_ASKED, "content": _PROBE}], [{"role": "system", "content": _PROBE}, _ASKED]):
            before, _, _ = self._try(messages, {}).partition(_PROBE)
            header = [t for t in self.control_tokens.findall(before) if t != self.tokenizer.bos_token]
            found.update(header[:1], header[-1:])
        return frozenset(found)

    @cached_property
    def _stop_texts(self) -> list[str]:
        added = self.tokenizer.added_tokens_decoder
        return [str(added[i].content) for i in self.stops if i in added]

    @cached_property
    def control_tokens(self) -> re.Pattern[str]:
        """Matches any control token of the model, the longest first; never matches if there is none."""
        tokens = {t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        tokens |= {t for t in (*self.tokenizer.all_special_tokens, *self._stop_texts) if t}
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")

    def control_token_fault(self, value: Any, at: str) -> Fault | None:
        """The fault of the first control token in any string of a row's value, keys of objects included.

        Such a token is refused, because in the rendered text it could end a message or begin another one.
        """
        if isinstance(value, str):
            match = self.control_tokens.search(value)
            text = f"{at} contains {match.group()!r}, a control token of the base model." if match else ""
            return Fault("special_token_in_text", at, text) if match else None
        if isinstance(value, dict):
            # Keys are checked too, since those of a tool's schema become text of the prompt.
            if hidden := next((found for found in map(self.control_tokens.search, value) if found), None):
                text = f"a key in {at or 'the row'} contains {hidden.group()!r}, a control token of the base model."
                return Fault("special_token_in_text", at or None, text)
            inner = (self.control_token_fault(v, f"{at}.{k}" if at else k) for k, v in value.items())
        elif isinstance(value, list):
            inner = (self.control_token_fault(v, f"{at}[{i}]") for i, v in enumerate(value))
        else:
            return None
        return next((fault for fault in inner if fault), None)


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """The message with the arguments of its calls as JSON text, because some templates expect a string there."""
    calls = [
        {**c, "function": {**c["function"], "arguments": json.dumps(c["function"]["arguments"], ensure_ascii=False)}}
        for c in message.get("tool_calls", [])
    ]
    return {**message, "tool_calls": calls} if calls else message
