"""What is trained with the templates of the families that people fine-tune: worked out by hand, by the marks of others,
and by what a server and a model do."""

import re
from collections.abc import Iterable
from typing import Any

import pytest

from lorainit.data.chat.template import Rendered
from lorainit.data.formats.conversation import Fault
from tests.templates.conftest import CONTROL, ROWS, STOPS

# These differ from `byte-level` in spaces, and in the words that they know.
SLOW_MAKERS = ("byte-level, trimmed", "smollm2")

# Read off the templates by hand: what the generation prompt is continued with, up to the token that stops the model.
# `None`: the template has no words for such a row.
HERMES = '<tool_call>\n{"name": "dim", "arguments": {"level": 3}}\n</tool_call>'
XML = "<tool_call>\n<function=dim>\n<parameter=level>\n3\n</parameter>\n</function>\n</tool_call>"
THOUGHT = "<think>\nhm\n</think>\n\n"
EMPTY = "<think>\n\n</think>\n\n"


def _golden(end: str, *, thought: str = THOUGHT, tools: list[str] | None = None) -> dict[str, list[str] | None]:
    """Of a template that writes contents as they are and one token behind each."""
    one, two = f"Row one.{end}", f"Row two.{end}"
    return {
        "multi": [one, two], "weight": [two], "system": [one], "thinking": [f"{thought}Row one.{end}"], "tools": tools,
    }  # fmt: skip


GOLDEN: dict[str, dict[str, list[str] | None]] = {
    # Thinks, and leaves the empty thought out of every turn but the last.
    "trl:qwen3": {
        "multi": ["Row one.<|im_end|>", f"{EMPTY}Row two.<|im_end|>"],
        "weight": [f"{EMPTY}Row two.<|im_end|>"],
        "system": [f"{EMPTY}Row one.<|im_end|>"],
        "thinking": [f"{THOUGHT}Row one.<|im_end|>"],
        "tools": [f"{HERMES}<|im_end|>", f"{EMPTY}Dimmed.<|im_end|>"],
    },
    # The prompt has opened the thought already.
    "trl:qwen3_5_think": {
        "multi": ["Row one.<|im_end|>", "\n</think>\n\nRow two.<|im_end|>"],
        "weight": ["\n</think>\n\nRow two.<|im_end|>"],
        "system": ["\n</think>\n\nRow one.<|im_end|>"],
        "thinking": ["hm\n</think>\n\nRow one.<|im_end|>"],
        "tools": [f"\n</think>\n\n{XML}<|im_end|>", "\n</think>\n\nDimmed.<|im_end|>"],
    },
    "trl:qwen2_5": _golden("<|im_end|>", tools=[f"{HERMES}<|im_end|>", "Dimmed.<|im_end|>"]),
    # A final answer is `final` in a channel that the model chooses, and ends otherwise when it is not the last.
    "trl:gptoss": {
        "multi": ["<|channel|>final<|message|>Row one.<|end|>", "<|channel|>final<|message|>Row two.<|return|>"],
        "weight": ["<|channel|>final<|message|>Row two.<|return|>"],
        "system": ["<|channel|>final<|message|>Row one.<|return|>"],
        "thinking": [f"<|channel|>final<|message|>{THOUGHT}Row one.<|return|>"],
        "tools": [
            ' to=functions.dim<|channel|>commentary json<|message|>{"level": 3}<|call|>',
            "<|channel|>final<|message|>Dimmed.<|return|>",
        ],
    },
    "trl:llama3_1": _golden(
        "<|eot_id|>", tools=['{"name": "dim", "parameters": {"level": 3}}<|eot_id|>', "Dimmed.<|eot_id|>"]
    ),
    "trl:gemma3": _golden("<end_of_turn>"),
    "trl:gemma": _golden("<end_of_turn>") | {"system": None},
    # Ends every text with an end-of-text token of its own, behind the token that the model stops at.
    "trl:phi3": _golden("<|end|>"),
    # No prompt: the answer begins right behind [/INST], with the space that stands there.
    "axolotl:mistral_v1": {
        "multi": [" Row one.</s>", " Row two.</s>"],
        "weight": [" Row two.</s>"],
        "system": [" Row one.</s>"],
        "thinking": [f" {THOUGHT}Row one.</s>"],
        "tools": None,
    },
    # Drops thoughts from every answer, and its prompt opens one.
    "trl:deepseekv3": _golden("<｜end▁of▁sentence｜>", thought="\n\n"),
    # Only the first token of the next message would end an answer, and the last has none.
    "trl:glm4moe": {
        "multi": ["\n<think></think>\nRow one.", "\n<think></think>\nRow two."],
        "weight": ["\n<think></think>\nRow two."],
        "system": ["\n<think></think>\nRow one."],
        "thinking": ["\n<think>hm</think>\nRow one."],
        "tools": [
            "\n<think></think>\n<tool_call>dim\n<arg_key>level</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
            "\n<think></think>\nDimmed.",
        ],
    },
    # As a server that asks for no thinking would go on.
    "trl:nemotron_3_nano": {
        "multi": ["Row one.<|im_end|>", "Row two.<|im_end|>"],
        "weight": ["Row two.<|im_end|>"],
        "system": ["Row one.<|im_end|>"],
        "thinking": ["hm\n</think>\n\nRow one.<|im_end|>"],
        "tools": [f"\n{XML}\n<|im_end|>", "Dimmed.<|im_end|>"],
    },
    "trl:cohere2": _golden("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    "trl:lfm2_v2": _golden(
        "<|im_end|>", tools=["<|tool_call_start|>[dim(level=3)]<|tool_call_end|><|im_end|>", "Dimmed.<|im_end|>"]
    ),
    "trl:gemma4": _golden(
        "<turn|>", tools=["<|tool_call>call:dim{level:3}<tool_call|><|tool_response>", "Dimmed.<turn|>"]
    ),
    # Names whom it speaks to, which the prompt leaves to the model.
    "trl:muse_glimmer": {
        "multi": [" to=user<|message|>Row one.<|eot|>", " to=user<|message|>Row two.<|eot|>"],
        "weight": [" to=user<|message|>Row two.<|eot|>"],
        "system": [" to=user<|message|>Row one.<|eot|>"],
        "thinking": [f" to=user<|message|>{THOUGHT}Row one.<|eot|>"],
        "tools": [
            ' to=dim<|message|><atem:function_calls>\n<atem:invoke name="dim">\n<atem:parameter name="level">3'
            "</atem:parameter>\n</atem:invoke>\n</atem:function_calls><|eot|>",
            " to=user<|message|>Dimmed.<|eot|>",
        ],
    },
}


@pytest.mark.parametrize("row", ["multi", "weight", "system", "thinking", "tools"])
@pytest.mark.parametrize("name", GOLDEN)
def test_mask_of_a_family_is_as_worked_out_by_hand(pair: Any, name: str, row: str) -> None:
    family, expected = pair(name), GOLDEN[name][row]
    if expected is None:
        assert isinstance(family.render(ROWS[row]), Fault)
    else:
        assert family.answers(ROWS[row]) == expected


# Rows, by template, before whose last answer a server sends other words than the template writes there later: it opens
# a thought that the text does not have, moves the system prompt into the last question, or leaves a header out.
ALL = {"single", "multi", "weight", "system", "thinking", "tools"}
DIFFERING = {
    "axolotl:gemma4": ALL,
    "axolotl:gemma4_unified": ALL,
    "axolotl:mistral_v2v3": {"system"},
    "axolotl:mistral_v3_tekken": {"system"},
    "axolotl:pixtral": {"system"},
    "axolotl:qwen3": {"multi", "thinking", "tools"},
    "axolotl:qwen3_5": {"multi", "thinking", "tools"},
    "trl:deepseek_r1_distill": ALL - {"tools"},
    "trl:deepseek_r1_distill_training": ALL - {"tools", "thinking"},
    "trl:deepseekv3": ALL - {"tools"},
    "trl:deepseekv3_training": ALL - {"tools"},
    "trl:diffusion_gemma": {"tools"},
    "trl:diffusion_gemma_training": {"tools"},
    **{
        f"trl:nemotron_3_{model}{kind}": ALL - {"thinking"}
        for model in ("nano", "super", "ultra", "5_lightning")
        for kind in ("", "_training")
    },
    "trl:qwen3_5_nothink": {"multi", "thinking"},
    "trl:qwen3_5_nothink_training": {"thinking"},
    "trl:qwen3_5_think": {"multi"},
    "trl:qwen3_6": {"multi"},
}
# Answers that end with no token to stop at, and contents of which the template leaves something out.
SILENT = {
    "axolotl:llava": ALL - {"tools"},
    "axolotl:metharme": {"multi"},
    "trl:glm4moe": ALL,
    "trl:glm4moe_training": ALL,
    "trl:gptoss": {"multi"},
    "trl:gptoss_training": {"multi"},
}
FORGETFUL = (
    "axolotl:deepseek_v3",
    "axolotl:exaone4",
    "trl:deepseek_r1_distill",
    "trl:deepseekv3",
    "trl:deepseekv3_training",
)
LEFT_OUT = {name: {"thinking"} for name in FORGETFUL}


def rendering(pair: Any, sources: Iterable[str], kind: str, rows: Iterable[str] = ROWS) -> Any:
    """(name, family, row's name, row) of everything that renders."""
    for name in sources:
        family = pair(name, kind)
        for row_name in rows:
            if isinstance(family.render(ROWS[row_name]), Rendered):
                yield name, family, row_name, ROWS[row_name]


def _bare(text: str) -> str:
    """Without the spaces that some tokenizers put behind control tokens."""
    return re.sub(rf"({CONTROL.pattern}) ", r"\1", text).replace("▁", " ")


@pytest.mark.parametrize(
    "kind", ["byte-level", "metaspace", *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW_MAKERS)]
)
def test_ids_of_prompt_and_answer_are_what_is_trained_with_every_template(
    pair: Any, sources: dict[str, str], kind: str
) -> None:
    wrong, tried = list[tuple[str, str]](), 0
    rows = ("single", "weight") if kind == "smollm2" else ROWS
    for name, family, row_name, row in rendering(pair, sources, kind, rows):
        rendered = family.render(row)
        if any(warning.code == "prompt_differs" for warning in rendered.warnings):
            continue
        prompt = family.prompt(row)
        answer = rendered.text[len(prompt) : rendered.spans[-1].end]
        sent, (ids, stretches) = family.ids(prompt), family.trained(row)
        start, end = stretches[-1]
        # Where an earlier answer was generated too, its first tokens may be others than those that a server reads back.
        alike = rendered.text.startswith(prompt) and (len(stretches) > 1 or ids[:start] == sent)
        alike = alike and _bare(family.written(ids[start:end])) == _bare(answer)
        if kind != "metaspace":  # which puts a space before every text of its own
            alike = alike and ids[start:end] == family.ids(answer)
        tried += 1
        wrong += [] if alike else [(name, row_name)]
    assert wrong == []
    assert tried > 150


def test_warnings_are_where_the_templates_deserve_them(pair: Any, sources: dict[str, str]) -> None:
    differing, left_out, silent = dict[str, set[str]](), dict[str, set[str]](), dict[str, set[str]]()
    for name, family, row_name, row in rendering(pair, sources, "byte-level"):
        codes = {warning.code for warning in family.render(row).warnings}
        if "prompt_differs" in codes:
            differing.setdefault(name, set()).add(row_name)
        if "content_left_out" in codes:
            left_out.setdefault(name, set()).add(row_name)
        ids, stretches = family.trained(row)
        if any(ids[end - 1] not in family.stops for _, end in stretches):
            silent.setdefault(name, set()).add(row_name)
    assert (differing, left_out, silent) == (DIFFERING, LEFT_OUT, SILENT)


def test_blank_question_changes_no_answer_with_any_template(pair: Any, sources: dict[str, str]) -> None:
    first, one, second, two = ROWS["multi"]["messages"]
    wrong, tried = list[str](), 0
    for name in sources:
        family = pair(name)
        rows = [{"messages": [first, one, {**second, "content": text}, two], "tools": []} for text in ("Two?", " ", "")]
        if all(isinstance(family.render(row), Rendered) for row in rows):
            asked, *blank = (family.answers(row) for row in rows)
            wrong += [] if blank == [asked, asked] else [name]
            tried += 1
    assert wrong == []
    assert tried > 80


def test_answer_right_behind_an_answer_has_its_prompt_or_a_warning_with_any_template(
    pair: Any, sources: dict[str, str]
) -> None:
    first, one, second, two = ROWS["multi"]["messages"]
    row = {"messages": [first, one, two, second, one], "tools": []}
    wrong, tried = list[str](), 0
    for name in sources:
        family = pair(name)
        rendered = family.render(row)
        if isinstance(rendered, Fault) or any(warning.code == "prompt_differs" for warning in rendered.warnings):
            continue
        tried += 1
        before = rendered.text[: rendered.spans[1].start]
        wrong += [] if any(before.endswith(prompt) for prompt in family.template._prompts) else [name]
    assert wrong == []
    assert tried > 40


@pytest.mark.parametrize("row_name", ["single", "multi", "weight", "system", "tools"])
def test_mask_is_that_of_templates_that_mark_what_is_generated(
    pair: Any, sources: dict[str, str], row_name: str
) -> None:
    wrong, tried = list[str](), 0
    marking = [name for name, source in sources.items() if "generation %}" in source]
    for name, family, _, row in rendering(pair, marking, "byte-level", [row_name]):
        rendered, marked = family.render(row), family.marked(row)
        if len(marked) != len(rendered.spans):
            continue  # more than one block to a turn
        tried += 1
        for (start, end), span in zip(marked, rendered.spans, strict=True):
            # Authors mark what a prompt has opened already, and the white space behind the end, or a second end.
            opened, more = rendered.text[start : span.start], rendered.text[span.end : end].strip()
            ours = rendered.text[end : span.end]  # a token to stop at that begins the next message
            alike = any(opened in prompt for prompt in family.template._prompts)
            alike = alike and more in ("", family.tokenizer.eos_token) and (not ours or ours in STOPS)
            wrong += [] if alike else [name]
    assert wrong == []
    assert tried >= 10
