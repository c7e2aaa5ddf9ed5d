"""One row to text with the places the loss looks at: the chat template seen from outside.

Spans are found by rendering prefixes of the conversation, so any template works that renders a
longer conversation as a continuation of the shorter one; others are refused, not guessed at.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lorainit import rendering
from lorainit.conversation import Fault, trained
from lorainit.errors import UnsupportedModel

Messages = list[dict[str, Any]]

_PROBE = "zq_probe"
_PROBE_TOOL = {"type": "function", "function": {"name": _PROBE, "description": "", "parameters": {}}}
_PROBE_CALL = {"id": "call00000", "type": "function", "function": {"name": _PROBE, "arguments": {}}}
_ASKED = {"role": "user", "content": "a"}
_WEIGHTLESS = ("weight", "function_call")


@dataclass(frozen=True)
class Rendered:
    """Text and the trained character ranges [start, end) in it, in order."""

    text: str
    spans: tuple[tuple[int, int], ...]


class Template:
    """What a tokenizer's chat template does, with what it can do found out by trying."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def render(self, value: dict[str, Any]) -> Rendered | Fault:
        """A normalized chat row up to its last trained turn, or the row's fault.

        A span is what a generation prompt would have to be continued with: content, tool calls and
        the end-of-turn token, without the template's white space after it.

        Raises:
            UnsupportedModel: no template, the template refuses the conversation, breaks a bound of
                `rendering`, or is not prefix-stable.
        """
        messages, tools = value["messages"], value["tools"]
        if fault := self._tool_fault(messages, tools):
            return fault
        last = max(i for i, m in enumerate(messages) if trained(m))
        options = {"tools": tools or None}
        if "parallel_tool_calls" in value:
            options["parallel_tool_calls"] = value["parallel_tool_calls"]
        text = self._text(messages[: last + 1], options)
        turns = [i for i in range(last + 1) if trained(messages[i])]
        return Rendered(text, tuple(self._span(text, messages, i, options) for i in turns))

    def _span(self, text: str, messages: Messages, index: int, options: dict[str, Any]) -> tuple[int, int]:
        before = self._opening(messages, options) if index == 0 else self._text(messages[:index], options, prompt=True)
        upto = self._text(messages[: index + 1], options)
        if not text.startswith(upto) or not upto.startswith(before):
            raise UnsupportedModel(
                "The base model's chat template does not render a longer conversation as a continuation of the"
                f" shorter one (message {index}), so the trained part cannot be told apart.",
                param="model",
            )
        return len(before), self._end_of_turn(upto, len(before))

    def _opening(self, messages: Messages, options: dict[str, Any]) -> str:
        # With nothing before the first message there is no generation prompt to ask for: what two
        # different answers have in common is what stands before them.
        one, two = (self._text([{**messages[0], "content": c, "tool_calls": None}], options) for c in ("0", "1"))
        return one[: next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), 0)]

    def _end_of_turn(self, text: str, start: int) -> int:
        ends = [match.end() for match in self.control_tokens.finditer(text, start)]
        return ends[-1] if ends and not text[ends[-1] :].strip() else len(text)

    def _text(self, messages: Messages, options: dict[str, Any], *, prompt: bool = False) -> str:
        clean = [{k: v for k, v in m.items() if k not in _WEIGHTLESS and v is not None} for m in messages]
        clean = [{**m, "content": m.get("content", "")} for m in clean]
        options = {**options, "tokenize": False, "add_generation_prompt": prompt}
        try:
            self._source_checked  # noqa: B018 - once for all rows
            return rendering.render(lambda: str(self.tokenizer.apply_chat_template(clean, **options)))
        except UnsupportedModel:
            raise
        except Exception as error:  # whatever the template's own expressions raise
            why = "it has none" if self.tokenizer.chat_template is None else str(error) or type(error).__name__
            raise UnsupportedModel(
                f"The base model's chat template cannot render the conversation: {why}", param="model"
            ) from error

    @cached_property
    def _source_checked(self) -> bool:
        sources = self.tokenizer.chat_template or ""
        for source in sources.values() if isinstance(sources, dict) else [sources]:
            rendering.check_source(source)
        return True

    def check(self) -> str:
        """Try it on conversations of every kind.

        Returns:
            What it makes of a question and its answer.

        Raises:
            Unbounded: it takes too long, too much memory, or renders too much.
            UnsupportedModel: it cannot render a question and its answer, so no row could be trained.
        """
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
        call = {"role": "assistant", "content": "", "tool_calls": [_PROBE_CALL]}
        return self._shows_probe([_ASKED, call], {})

    def _shows_probe(self, messages: Messages, options: dict[str, Any], *, prompt: bool = False) -> bool:
        try:
            return _PROBE in self._text(messages, options, prompt=prompt)
        except rendering.Unbounded:
            raise
        except UnsupportedModel:
            return False

    @cached_property
    def control_tokens(self) -> re.Pattern[str]:
        """Matches any control token of the model; never matches if there is none."""
        tokens = {t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        tokens |= {t for t in self.tokenizer.all_special_tokens if t}
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")

    def control_token_fault(self, value: Any, at: str) -> Fault | None:
        """The first control token anywhere in the strings of a row's value."""
        if isinstance(value, str):
            match = self.control_tokens.search(value)
            text = f"{at} contains {match.group()!r}, a control token of the base model." if match else ""
            return Fault("special_token_in_text", at, text) if match else None
        if isinstance(value, dict):
            inner = (self.control_token_fault(v, f"{at}.{k}" if at else k) for k, v in value.items())
        elif isinstance(value, list):
            inner = (self.control_token_fault(v, f"{at}[{i}]") for i, v in enumerate(value))
        else:
            return None
        return next((fault for fault in inner if fault), None)
