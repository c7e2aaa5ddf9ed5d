"""Which tokens are trained: those that a model would generate behind the prompt that a server sends."""

import re
import string
from collections.abc import Iterator
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lorainit.data.chat.template import Rendered, Template
from lorainit.data.dataset import Dataset
from lorainit.data.formats.conversation import Fault
from lorainit.data.reader import Encoder, load
from tests.lorainit.conftest import SPECIALS, TEMPLATE, chat, make_tokenizer, write_rows

WORDS = ["system user assistant tool\n\n\n\n    x", "Two is four. ASSISTANT: USER: Two\n\nTwo", "the the cat sat"] * 4
# Drops <think> and adds an end token for the last turn only, as the templates of models that think do.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
NO_PROMPT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
INST = (
    "{% for m in messages %}{{ '[I]' + m.content + '[/I]' if m.role == 'user' else ' ' + m.content + eos_token }}"
    "{% endfor %}"
)
NO_END = (
    "{% for m in messages %}{{ '### ' + m.role }}\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant\n{% endif %}"
)


def byte_level(template: str, *, trim: bool = False) -> PreTrainedTokenizerFast:
    """Merges over white space and newlines; with `trim`, offsets leave them out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    return _fast(tokenizer, trainer, template)


def metaspace(template: str, *, scheme: str = "always") -> PreTrainedTokenizerFast:
    """As SentencePiece does it: a text at its beginning gets a space before it (`legacy`: by a normalizer)."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token=None))
    if scheme == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    alphabet = [*string.printable, "▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=240, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    return _fast(tokenizer, trainer, template)


def _fast(tokenizer: Tokenizer, trainer: Any, template: str) -> PreTrainedTokenizerFast:
    tokenizer.train_from_iterator(WORDS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = template
    return fast


KINDS = {
    "byte-level": byte_level,
    "byte-level, trimmed": lambda template: byte_level(template, trim=True),
    "metaspace": metaspace,
    "metaspace first": lambda template: metaspace(template, scheme="first"),
    "metaspace legacy": lambda template: metaspace(template, scheme="legacy"),
}


def read(tokenizer: PreTrainedTokenizerFast, tmp_path: Any, *rows: Any, **options: Any) -> Dataset:
    return load(write_rows(tmp_path / "rows.jsonl", list(rows)), tokenizer, max_length=4096, **options)


def runs(data: Dataset, row: int = 0) -> Iterator[list[int]]:
    """The stretches of trained ids."""
    current: list[int] = []
    for token, on in zip(data.samples[row].ids.tolist(), data.samples[row].trained.tolist(), strict=True):
        if on:
            current.append(token)
        elif current:
            yield current
            current = []
    if current:
        yield current


def turns(*answers: str) -> dict[str, Any]:
    return {"messages": [message for answer in answers for message in chat("Two?", answer)["messages"]]}


@pytest.mark.parametrize("template", [TEMPLATE, THINKING, VICUNA])
@pytest.mark.parametrize("answer", ["Two is", "\n\nTwo", "    x\n        x", "  Two  "])
@pytest.mark.parametrize("kind", KINDS)
def test_prompt_as_sent_and_answer_as_generated_are_the_tokens(
    tmp_path: Any, kind: str, answer: str, template: str
) -> None:
    tokenizer = KINDS[kind](template)
    sample = read(tokenizer, tmp_path, chat("Two?", answer)).samples[0]
    question = chat("Two?", answer)["messages"][:1]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    assert sample.ids[: len(prompt)].tolist() == prompt
    trained = sample.trained.tolist()
    end = len(trained) - trained[::-1].index(True)
    assert trained == [False] * len(prompt) + [True] * (end - len(prompt)) + [False] * (len(trained) - end)
    thought = "\n</think>\n\n" if template == THINKING else ""
    generated = tokenizer.decode(sample.ids[:end]).removeprefix(tokenizer.decode(prompt))
    assert generated == f"{thought}{answer}<|im_end|>"


@pytest.mark.parametrize("kind", ["byte-level", "byte-level, trimmed"])
def test_answer_is_tokenized_as_a_text_of_its_own(tmp_path: Any, kind: str) -> None:
    tokenizer = KINDS[kind](VICUNA)
    data = read(tokenizer, tmp_path, turns("Two is", "Two"))
    assert len(tokenizer.tokenize(" Two")) < len(tokenizer.tokenize(" ") + tokenizer.tokenize("Two"))
    assert list(runs(data)) == [tokenizer("Two is<|im_end|>").input_ids, tokenizer("Two<|im_end|>").input_ids]


def test_metaspace_answer_goes_on_without_a_space_that_nobody_generated(tmp_path: Any) -> None:
    tokenizer = metaspace(VICUNA)
    (ids,) = runs(read(tokenizer, tmp_path, chat("Two?", "Two")))
    assert "".join(tokenizer.convert_ids_to_tokens(ids)) == "Two<|im_end|>"
    assert "".join(tokenizer.tokenize("Two")) == "▁Two"


@pytest.mark.parametrize("trim", [False, True])
def test_indentation_is_trained_whatever_offsets_leave_out(tmp_path: Any, trim: bool) -> None:
    tokenizer = byte_level(TEMPLATE, trim=trim)
    (ids,) = runs(read(tokenizer, tmp_path, chat("Two?", "x\n        x\n")))
    assert tokenizer.decode(ids) == "x\n        x\n<|im_end|>"


def test_every_turn_is_trained_where_the_last_is_rendered_otherwise(tmp_path: Any) -> None:
    tokenizer = byte_level(THINKING)
    data = read(tokenizer, tmp_path, turns("Two", "four"))
    assert [tokenizer.decode(ids) for ids in runs(data)] == ["Two<|im_end|>", "\n</think>\n\nfour<|im_end|>"]
    assert data.warnings["prompt_differs"] == 1  # a server sends <think> before the first answer too
    row = turns("Two", "four")["messages"]
    assert tokenizer.decode(data.samples[0].ids) == tokenizer.apply_chat_template(row, tokenize=False)


def test_header_that_no_prompt_asks_for_is_not_trained(tmp_path: Any) -> None:
    tokenizer = byte_level(NO_PROMPT)
    data = read(tokenizer, tmp_path, turns("Two", "four"))
    assert [tokenizer.decode(ids) for ids in runs(data)] == ["Two<|im_end|>", "four<|im_end|>"]
    assert data.warnings["prompt_differs"] == 1


def test_white_space_of_a_template_without_prompt_is_the_answers(tmp_path: Any) -> None:
    source = (
        "{% for m in messages %}{{ '[I]' + m.content + '[/I]' if m.role == 'user' else ' ' + m.content + eos_token }}"
    )
    tokenizer = byte_level(source + "{% endfor %}")
    data = read(tokenizer, tmp_path, turns("Two", "four"))
    assert list(runs(data)) == [tokenizer(" Two<|im_end|>").input_ids, tokenizer(" four<|im_end|>").input_ids]
    assert not data.warnings["prompt_differs"]


def test_answer_without_a_token_to_stop_at_is_a_warning_that_names_its_last_token(tmp_path: Any) -> None:
    tokenizer = byte_level(NO_END)
    data = read(tokenizer, tmp_path, turns("four."))
    assert [tokenizer.decode(ids) for ids in runs(data)] == ["four."]
    assert data.warnings["no_stop_token"] == 1
    assert "Line 1: the last answer ends with '.', at which the model does not stop" in data.remarks[0].message


# As gpt-oss: a last answer ends with the token at which the model stops, and an earlier one with another.
ENDS_OTHERWISE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{{ '<|im_end|>' if loop.last and m.role == 'assistant' else '<|endoftext|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_every_answer_without_a_token_to_stop_at_is_counted_in_the_warning(tmp_path: Any) -> None:
    tokenizer = byte_level(ENDS_OTHERWISE)
    data = read(tokenizer, tmp_path, turns("Two", "Two", "four"), append_eos=True)
    expected = ["Two<|endoftext|>", "Two<|endoftext|>", "four<|im_end|>"]
    assert [tokenizer.decode(ids) for ids in runs(data)] == expected
    assert data.warnings["no_stop_token"] == 1
    assert "2 of 3 answers end with a token at which the model does not stop" in data.remarks[0].message
    assert "'<|endoftext|>'" in data.remarks[0].message


def test_append_eos_trains_the_end_token_behind_the_last_answer(tmp_path: Any) -> None:
    tokenizer = byte_level(NO_END)
    data = read(tokenizer, tmp_path, turns("Two", "four."), turns("four."), append_eos=True)
    assert [[tokenizer.decode(ids) for ids in runs(data, row)] for row in (0, 1)] == [
        ["Two", "four.<|im_end|>"],
        ["four.<|im_end|>"],
    ]
    assert data.samples[0].ids[-1] == tokenizer.eos_token_id
    assert data.warnings["no_stop_token"] == 1  # the first answer of the first row


# As Metharme: one token begins a message of a role, and only a last answer has an end.
ROLES_ONLY = (
    "{% for m in messages %}{{ '<|endoftext|>' if m.role == 'user' else '<|im_start|>' }}{{ m.content }}{% endfor %}"
    "{{ '<|im_start|>' if add_generation_prompt else '<|im_end|>' }}"
)
PAIRED_HEADER = ROLES_ONLY.replace("'<|endoftext|>'", "'<|endoftext|><|im_start|>'")


@pytest.mark.parametrize("template", [ROLES_ONLY, PAIRED_HEADER])
@pytest.mark.parametrize("question", ["", " ", "Two"])
def test_header_of_the_next_message_is_no_end_of_an_answer_also_if_that_is_blank(
    tmp_path: Any, question: str, template: str
) -> None:
    tokenizer = byte_level(template)
    row = {"messages": [*chat("Two?", "Two")["messages"], *chat(question, "four")["messages"]]}
    data = read(tokenizer, tmp_path, row)
    assert [tokenizer.decode(ids) for ids in runs(data)] == ["Two", "four<|im_end|>"]
    assert data.warnings["no_stop_token"] == 1


MERGING = (
    "{% for m in messages %}{% if loop.first or loop.previtem.role != m.role %}<|im_start|>{{ m.role }}\n{% endif %}"
    "{{ m.content }}{% if loop.last or loop.nextitem.role != m.role %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_answers_that_a_template_merges_are_told_of(tmp_path: Any) -> None:
    tokenizer = byte_level(MERGING)
    asked, first, second = *chat("Two?", "Two")["messages"], chat("", "four")["messages"][1]
    data = read(tokenizer, tmp_path, {"messages": [asked, first, second, asked, second]})
    assert [tokenizer.decode(ids) for ids in runs(data)] == ["Twofour<|im_end|>", "four<|im_end|>"]
    assert (data.warnings["prompt_differs"], data.warnings["no_stop_token"]) == (1, 1)
    assert next(r.param for r in data.remarks if r.code == "prompt_differs") == "messages[2]"
    assert "1 of 3 answers" in next(r.message for r in data.remarks if r.code == "no_stop_token")


def test_append_eos_changes_nothing_where_answers_end(tmp_path: Any) -> None:
    tokenizer = byte_level(TEMPLATE)
    one, two = (read(tokenizer, tmp_path, turns("Two"), append_eos=asked).samples[0] for asked in (False, True))
    assert one.ids.tolist() == two.ids.tolist() and one.trained.tolist() == two.trained.tolist()


@pytest.mark.parametrize(("stops", "warned"), [([2, 0], 0), ([0], 1), (1, 1)])
def test_stop_tokens_are_those_of_the_generation_config(tmp_path: Any, stops: Any, warned: int) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {stops}}}')
    data = read(tokenizer, tmp_path, turns("Two"), folder=tmp_path)
    assert data.warnings["no_stop_token"] == warned
    assert [tokenizer.decode(ids) for ids in runs(data)] == ["Two<|im_end|>"]


def test_first_token_to_stop_at_ends_an_answer(tmp_path: Any) -> None:
    ends_twice = TEMPLATE + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}"
    tokenizer = make_tokenizer(ends_twice)
    (ids,) = runs(read(tokenizer, tmp_path, turns("Two")))
    assert tokenizer.decode(ids) == "Two<|im_end|>"


LOSING = {
    "{{ m.content | length }}": "writes other words around a message",
    "{{ m.role }}": r"messages\[1\]: its content does not reach the text",
}


@pytest.mark.parametrize("words", LOSING)
def test_row_that_cannot_be_told_apart_is_an_error_of_that_row(words: str) -> None:
    dropping = "{% if messages | length > 2 %}{% for m in messages %}" + words + "{% endfor %}{% else %}"
    template = Template(make_tokenizer(dropping + TEMPLATE + "{% endif %}"))
    fault = template.render({**turns("Two", "four"), "tools": []})
    assert isinstance(fault, Fault) and fault.code == "template_error"
    assert re.search(LOSING[words], fault.text)
    assert isinstance(template.render({**turns("Two"), "tools": []}), Rendered)


def test_content_that_a_template_leaves_out_is_a_warning(tmp_path: Any) -> None:
    forgetting = TEMPLATE.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    data = read(make_tokenizer(forgetting), tmp_path, turns("<think>hm</think>Two"))
    assert data.warnings["content_left_out"] == 1


def test_question_that_ends_as_a_template_asks_is_no_obstacle(tmp_path: Any) -> None:
    asking = TEMPLATE + "{% if messages[0].content.endswith('x>') %}<|endoftext|>{% endif %}"
    tokenizer = make_tokenizer(asking)
    row = {"messages": [*chat("<x>", "Two")["messages"], *chat("a", "four")["messages"]]}
    data = read(tokenizer, tmp_path, row)
    assert [tokenizer.decode(ids) for ids in runs(data)] == ["Two<|im_end|>", "four<|im_end|>"]


def test_prompt_in_plain_words_is_not_looked_for_in_a_question(tmp_path: Any) -> None:
    asking = NO_END + "{% if messages[0].content.endswith('xy') %}!{% endif %}"
    template = Template(make_tokenizer(asking))
    row = {"messages": chat("### assistant\nxy", "Two")["messages"], "tools": []}
    fault = template.render(row)
    assert isinstance(fault, Fault) and "cannot be told apart" in fault.text


def test_words_of_a_prompt_in_a_question_or_an_answer_are_just_words(tmp_path: Any) -> None:
    tokenizer = byte_level(NO_END)
    data = read(tokenizer, tmp_path, chat("a\n\n### assistant\nb", "c\n\n### assistant\nd"))
    assert [tokenizer.decode(ids) for ids in runs(data)] == ["c\n\n### assistant\nd"]


def test_characters_that_marks_are_made_of_may_be_in_a_row(tmp_path: Any) -> None:
    tokenizer = make_tokenizer()
    (ids,) = runs(read(tokenizer, tmp_path, turns("\U00040000 \U00040001")))
    assert tokenizer.decode(ids) == "\U00040000 \U00040001<|im_end|>"


def test_arguments_are_text_for_a_template_that_adds_them_to_a_text(tmp_path: Any) -> None:
    adding = TEMPLATE.replace("{{ c.function.arguments | tojson }}", "{{ 'with ' + c.function.arguments }}")
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"x": 2}'}}
    row = {"messages": [chat("a", "b")["messages"][0], {"role": "assistant", "content": None, "tool_calls": [call]}]}
    tokenizer = make_tokenizer(adding)
    (ids,) = runs(read(tokenizer, tmp_path, row))
    assert tokenizer.decode(ids) == '<call>add with {"x": 2}</call><|im_end|>'


@pytest.mark.parametrize(("length", "times"), [(1, 2), (2, 3), (50, 3)])
def test_a_row_is_rendered_two_or_three_times_however_many_turns_it_has(
    length: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = Template(make_tokenizer())
    template.render({**turns("Two"), "tools": []})  # what is tried once for all rows
    rendered: list[int] = []
    whole = template.tokenizer.apply_chat_template
    monkeypatch.setattr(
        template.tokenizer, "apply_chat_template", lambda chat, **o: rendered.append(1) or whole(chat, **o)
    )
    found = template.render({**turns(*["Two"] * length), "tools": []})
    assert isinstance(found, Rendered) and len(found.spans) == length
    assert len(rendered) == times


@pytest.mark.parametrize("kind", KINDS)
def test_completion_goes_on_from_its_prompt(kind: str) -> None:
    tokenizer = KINDS[kind](TEMPLATE)
    ids, trained, _ = Encoder(tokenizer).encode_pair("ASSISTANT: ", "Two")
    prompt = tokenizer("ASSISTANT: ").input_ids
    assert ids[: len(prompt)].tolist() == prompt
    assert trained.tolist() == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
    assert tokenizer.decode(ids).removeprefix(tokenizer.decode(prompt)) == "Two<|im_end|>"
