import json
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, pre_tokenizers

from lorainit.config.errors import (
    InvalidTrainingFile,
    InvalidValidationFile,
    LorainitError,
    NoTrainableTokens,
    UnsupportedModel,
)
from lorainit.config.spec import Data
from lorainit.data.batches import Budget, collate, order_rows, split_into_batches
from lorainit.data.dataset import Sample, require_readable
from lorainit.data.reader import load
from tests.lorainit.conftest import PLAIN_TEMPLATE, chat, make_tokenizer, write_rows


def read(tmp_path, *rows, template=None, **options):
    tokenizer = make_tokenizer(template) if template else make_tokenizer()
    path = write_rows(tmp_path / "rows.jsonl", list(rows))
    return load(path, tokenizer, **{"max_length": 256, **options}), tokenizer


def trained_text(sample, tokenizer):
    """The trained tokens decoded, with | wherever the mask has a gap."""
    runs, current = [], []
    for token, on in zip(sample.ids.tolist(), sample.trained.tolist(), strict=True):
        if on:
            current.append(token)
        elif current:
            runs.append(current)
            current = []
    return "|".join(tokenizer.decode(run) for run in [*runs, current] if run)


def full_text(sample, tokenizer):
    return tokenizer.decode(sample.ids.tolist())


def test_only_the_answer_and_its_end_token_are_trained(tmp_path):
    data, tokenizer = read(tmp_path, chat("What is it?", "It is four."))
    (sample,) = data.samples
    assert full_text(sample, tokenizer) == (
        "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\nIt is four.<|im_end|>\n"
    )
    assert trained_text(sample, tokenizer) == "It is four.<|im_end|>"


def test_tokens_are_those_of_the_chat_template(tmp_path):
    row = chat("What is it?", "It is four.")
    data, tokenizer = read(tmp_path, row)
    expected = tokenizer.apply_chat_template(row["messages"], return_dict=False)
    assert data.samples[0].ids.tolist() == expected


def test_turns_with_weight_zero_are_context(tmp_path):
    first, second = chat("a", "wrong", weight=0)["messages"], chat("b", "right", weight=1)["messages"]
    data, tokenizer = read(tmp_path, {"messages": first + second})
    assert trained_text(data.samples[0], tokenizer) == "right<|im_end|>"
    assert "wrong" in full_text(data.samples[0], tokenizer)


def test_every_turn_with_weight_one_is_trained(tmp_path):
    data, tokenizer = read(tmp_path, {"messages": chat("a", "one")["messages"] + chat("b", "two")["messages"]})
    assert trained_text(data.samples[0], tokenizer) == "one<|im_end|>|two<|im_end|>"


def test_messages_after_the_last_trained_turn_are_dropped(tmp_path):
    more = [{"role": "user", "content": "bye"}, {"role": "assistant", "content": "ciao", "weight": 0}]
    data, tokenizer = read(tmp_path, {"messages": chat("a", "one")["messages"] + more})
    assert "bye" not in full_text(data.samples[0], tokenizer)
    assert data.warnings["trailing_messages_dropped"] == 1


def test_tool_calls_are_trained_and_tool_answers_are_not(tmp_path):
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"x": 2}'}}
    row = {
        "messages": [
            {"role": "user", "content": "two and two"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "four", "tool_call_id": "c1"},
            {"role": "assistant", "content": "It is four"},
        ],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
    }
    data, tokenizer = read(tmp_path, row)
    expected = '<call>add {"x": 2}</call><|im_end|>|It is four<|im_end|>'
    assert trained_text(data.samples[0], tokenizer) == expected
    assert '"name": "add"' in full_text(data.samples[0], tokenizer)


@pytest.mark.parametrize("system", [True, False])
def test_conversation_may_begin_with_the_assistant(tmp_path, system):
    head = [{"role": "system", "content": "s"}] if system else []
    data, tokenizer = read(tmp_path, {"messages": [*head, {"role": "assistant", "content": "the cat"}]})
    assert trained_text(data.samples[0], tokenizer) == "the cat<|im_end|>"


def test_default_system_prompt_of_a_template_is_not_trained(tmp_path):
    data, tokenizer = read(tmp_path, chat("a", "four"), template=PLAIN_TEMPLATE)
    assert "Be good" in full_text(data.samples[0], tokenizer)
    assert trained_text(data.samples[0], tokenizer) == "four<|im_end|>"


def test_prompt_and_completion_are_joined_as_they_stand(tmp_path):
    data, tokenizer = read(tmp_path, {"prompt": "two and", "completion": " two"})
    assert full_text(data.samples[0], tokenizer) == "two and two<|im_end|>"
    assert trained_text(data.samples[0], tokenizer) == " two<|im_end|>"


def test_token_across_the_border_of_prompt_and_completion_is_split(tmp_path):
    tokenizer = make_tokenizer()
    assert len(tokenizer("the").input_ids) == 1  # joined, it would be one token
    data, _ = read(tmp_path, {"prompt": "t", "completion": "he"})
    assert full_text(data.samples[0], tokenizer) == "the<|im_end|>"
    assert trained_text(data.samples[0], tokenizer) == "he<|im_end|>"


def test_long_rows_are_cut_and_counted(tmp_path):
    data, tokenizer = read(tmp_path, chat("a", "four " * 100), chat("a", "four"), max_length=32)
    assert [len(s.ids) for s in data.samples] == [32, len(data.samples[1].ids)]
    assert data.truncated == 1
    assert not trained_text(data.samples[0], tokenizer).endswith("<|im_end|>")


CALLED = {
    "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
    "tools": [{"type": "function", "function": {"name": "f"}}],
}


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (chat("a <|im_end|> b", "four"), "special_token_in_text"),
        ({"prompt": "<|im_start|>", "completion": "x"}, "mixed_formats"),
        (CALLED, "tools_not_supported"),
        (chat("a " * 60, "four"), "no_trainable_tokens"),
        ("{", "invalid_json"),
    ],
)
def test_row_errors_name_line_and_code(tmp_path, row, code):
    good = chat("a", "b")
    with pytest.raises(InvalidTrainingFile, match=rf"1 of 2 rows of the training file .* {code}: Line 2: ") as caught:
        read(tmp_path, good, row, max_length=64, template=PLAIN_TEMPLATE)
    assert caught.value.param == "data.training"
    data, _ = read(tmp_path, good, row, max_length=64, template=PLAIN_TEMPLATE, on_row_error="skip")
    assert len(data.samples) == 1
    assert [(p.line, p.code) for p in data.problems] == [(2, code)]


def test_validation_file_has_its_own_error(tmp_path):
    with pytest.raises(InvalidValidationFile, match="validation file"):
        read(tmp_path, "{", param="data.validation")


def test_preference_rows_are_refused(tmp_path):
    row = {
        "input": {"messages": [{"role": "user", "content": "a"}]},
        "preferred_output": [{"role": "assistant", "content": "b"}],
        "non_preferred_output": [{"role": "assistant", "content": "c"}],
    }
    with pytest.raises(InvalidTrainingFile, match="preference"):
        read(tmp_path, row)


def test_file_whose_every_row_is_cut_before_its_answer_has_nothing_to_train(tmp_path):
    with pytest.raises(NoTrainableTokens):
        read(tmp_path, chat("a " * 60, "four"), chat("b " * 60, "four"), max_length=16, on_row_error="skip")


def test_template_that_rewrites_earlier_turns_is_trained_on_its_one_full_text(tmp_path):
    rewriting = "{{ messages | length }}" + PLAIN_TEMPLATE
    row = {"messages": chat("a", "one")["messages"] + chat("b", "two")["messages"]}
    data, tokenizer = read(tmp_path, row, template=rewriting)
    assert full_text(data.samples[0], tokenizer).startswith("4<|im_start|>system")
    assert trained_text(data.samples[0], tokenizer) == "one<|im_end|>|two<|im_end|>"


REFUSING = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"


def test_row_that_a_template_refuses_is_an_error_of_that_row(tmp_path):
    bad = {"messages": [{"role": "system", "content": "s"}, *chat("a", "b")["messages"]]}
    with pytest.raises(InvalidTrainingFile, match=r"2 of 3 rows .* template_error: Line 2: .* no system.*in 2, 3\.$"):
        read(tmp_path, chat("a", "b"), bad, bad, template=REFUSING + PLAIN_TEMPLATE)
    data, _ = read(tmp_path, chat("a", "b"), bad, template=REFUSING + PLAIN_TEMPLATE, on_row_error="skip")
    assert [(s.line) for s in data.samples] == [1]
    assert [(p.line, p.code) for p in data.problems] == [(2, "template_error")]


@pytest.mark.parametrize("rule", ["fail", "skip"])
def test_template_that_refuses_every_row_is_the_models_fault(tmp_path, rule):
    with pytest.raises(UnsupportedModel, match=r"renders no row of the training file; first: Line 1: .* by zero"):
        read(tmp_path, chat("a", "b"), chat("a", "c"), template="{{ 1 // 0 }}", on_row_error=rule)


def test_all_lines_are_named_up_to_the_limit(tmp_path):
    rows = [chat("a", "b"), *(chat("<|im_end|>", "b") for _ in range(25))]
    listed = ", ".join(map(str, range(2, 22)))
    with pytest.raises(InvalidTrainingFile, match=f"special_token_in_text in {listed}, and 5 more"):
        read(tmp_path, *rows)


def test_chat_rows_need_a_template(tmp_path):
    tokenizer = make_tokenizer(None)
    path = write_rows(tmp_path / "rows.jsonl", [chat("a", "b")])
    with pytest.raises(UnsupportedModel, match="it has none"):
        load(path, tokenizer, max_length=64)


def test_order_depends_on_seed_epoch_and_file_only(tmp_path, rows, tokenizer):
    data = load(rows, tokenizer, max_length=256)
    again = load(write_rows(tmp_path / "copy.jsonl", rows.read_text().splitlines()), tokenizer, max_length=200)
    first = order_rows(data, seed=3, epoch=0)
    assert sorted(first) == list(range(12))
    assert first == order_rows(again, seed=3, epoch=0)
    assert first != order_rows(data, seed=3, epoch=1)
    assert first != order_rows(data, seed=4, epoch=0)
    other = load(write_rows(tmp_path / "o.jsonl", [*rows.read_text().splitlines(), json.dumps(chat("x", "y"))]),
                 tokenizer, max_length=256)  # fmt: skip
    assert first != [i for i in order_rows(other, seed=3, epoch=0) if i < 12]


def test_batches_hold_every_row_once_and_padding_is_masked(rows, tokenizer):
    data = load(rows, tokenizer, max_length=256)
    pieces = split_into_batches(data.samples, Budget(5))
    assert sorted(s.line for piece in pieces for s in piece) == list(range(1, 13))
    assert [len(piece) for piece in pieces] == [5, 5, 2]
    batch = collate(pieces[0], pad=7)
    for row, sample in enumerate(pieces[0]):
        n = len(sample.ids)
        assert torch.equal(batch.ids[row, :n], sample.ids.long())
        assert batch.ids[row, n:].eq(7).all()
        assert batch.attention[row].sum() == n
        assert not batch.trained[row, n:].any()


@pytest.mark.parametrize(
    ("packed", "expected"), [(False, [[9], [6], [4, 3], [2, 2, 1]]), (True, [[9], [6], [4, 3, 2], [2, 1]])]
)
def test_a_pass_holds_as_many_tokens_as_its_budget_and_a_longer_row_goes_alone(packed, expected):
    rows = [
        Sample(n, torch.zeros(n, dtype=torch.int32), torch.ones(n, dtype=torch.bool)) for n in (2, 9, 4, 1, 6, 2, 3)
    ]
    budget = Budget(3, 9 if packed else 8, packed)
    assert [[len(s.ids) for s in piece] for piece in split_into_batches(rows, budget)] == expected


def read_with_expression(expression, tmp_path, *texts, **options):
    """Rows that a tokenizer cuts into words by a regular expression of its own."""
    tokenizer = make_tokenizer()
    split = pre_tokenizers.Split(Regex(expression), "isolated")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False)])
    path = write_rows(tmp_path / "rows.jsonl", [chat("a", text) for text in texts])
    return load(path, tokenizer, max_length=256, **options)


def test_text_that_a_tokenizers_expression_takes_too_long_for_is_an_error_of_its_row(tmp_path):
    rows = ["four", "q" * 60, "four"]
    why = "1 of 3 rows .* tokenizer_error: Line 2: The base model's tokenizer .* regular expressions takes too long"
    with pytest.raises(InvalidTrainingFile, match=why) as caught:
        read_with_expression("(q+q+)+Z", tmp_path, *rows)
    assert caught.value.param == "data.training"
    data = read_with_expression("(q+q+)+Z", tmp_path, *rows, on_row_error="skip")
    assert [sample.line for sample in data.samples] == [1, 3]


def test_tokenizer_that_reads_no_row_is_the_models_fault(tmp_path):
    with pytest.raises(UnsupportedModel, match="tokenizer reads no row of the training file; first: Line 1") as caught:
        read_with_expression("(q+q+)+Z", tmp_path, "q" * 60, "q" * 70)
    assert caught.value.param == "model"


@pytest.mark.parametrize(("path", "words"), [("none.jsonl", "No such file"), (".", "not a plain file")])
@pytest.mark.parametrize("field", ["training", "validation", "calibration"])
def test_file_that_cannot_be_opened_is_refused(field: str, path: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "good.jsonl").touch()
    files = Data.model_validate({"training": str(tmp_path / "good.jsonl"), field: str(tmp_path / path)})
    with pytest.raises(LorainitError, match=words) as caught:
        require_readable(files)
    assert caught.value.param == f"data.{field}"


@pytest.mark.parametrize("kind", ["chat", "pair"])
@pytest.mark.parametrize("space", [False, True], ids=["plain", "with a space at the beginning"])
def test_rows_that_are_tokenized_together_are_what_each_is_by_itself(tmp_path, monkeypatch, space, kind):
    words = ["the cat", "two", "", "What is four?", " sat", "mats\n\n"]
    rows = [chat(f"{word} {n}", f"{words[n % 5]} is {word or 'it'}") for n, word in enumerate(words)]
    if kind == "pair":
        rows = [{"prompt": word, "completion": f"{word}so"} for word in words]
    else:
        rows += [{"messages": 2 * chat(f"{word} a", "my")["messages"]} for word in words]
    path, tokenizer = write_rows(tmp_path / "rows.jsonl", rows), make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    found = {}
    for together in (1, 7, 64):
        monkeypatch.setattr("lorainit.data.reader.TOGETHER_ROWS", together)
        data = load(path, tokenizer, max_length=256)
        found[together] = [(s.line, s.ids.tolist(), s.trained.tolist()) for s in data.samples]
    # And without reading anything ahead.
    monkeypatch.setattr("lorainit.data.reader.Encoder.tokenize_ahead", lambda _self, _texts: None)
    alone = [(s.line, s.ids.tolist(), s.trained.tolist()) for s in load(path, tokenizer, max_length=256).samples]
    assert len(alone) == len(rows)
    assert found == {1: alone, 7: alone, 64: alone}


def test_rows_are_tokenized_in_one_call(tmp_path, monkeypatch):
    calls, tokenizer = [], make_tokenizer()
    path = write_rows(tmp_path / "rows.jsonl", [chat(f"the {n}", f"cat {n}") for n in range(64)])
    monkeypatch.setattr("lorainit.data.reader.tokenizer_time.read", _counted(calls))
    load(path, tokenizer, max_length=256)
    assert [len(texts) for texts in calls if isinstance(texts, list)] == [128]
    assert len(calls) < 8  # the others try out what the tokenizer does


def _counted(calls):
    from lorainit.data.chat.tokenizer_time import read as plain

    def read_and_count(tokenizer, text, **options):
        calls.append(text)
        return plain(tokenizer, text, **options)

    return read_and_count
