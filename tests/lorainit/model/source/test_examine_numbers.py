"""Tokens, contexts and weights beyond what a model has room for are refused, or shown to be harmless."""

import json
from pathlib import Path

import pytest
import torch

from lorainit.config.errors import SequenceTooLong, UnsupportedModel
from lorainit.data.chat import tokenizer_time
from lorainit.data.chat.template import Template
from lorainit.model.inspect import inspect
from lorainit.model.load import check_length, load_tokenizer, locate_base
from lorainit.model.source.examine import examine
from tests.lorainit.conftest import change_json
from tests.zoo.bases import make

CPU = torch.device("cpu")


def add_token(folder: Path, *, special: bool, number: int = 5000) -> None:
    """A token `<far>` beyond the embedding's rows."""
    path = folder / "tokenizer.json"
    said = json.loads(path.read_text())
    said["model"]["vocab"]["<far>"] = number
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    said["added_tokens"].append({"id": number, "content": "<far>", "special": special, **flags})
    path.write_text(json.dumps(said))


def test_token_of_a_text_without_a_row_of_the_embedding_is_refused(llama: Path, tmp_path: Path) -> None:
    add_token(llama, special=False)
    with pytest.raises(UnsupportedModel, match=r"embedding has 320 rows, and the vocabulary has .*: <far>\."):
        inspect(str(llama), cache=tmp_path)


@pytest.mark.parametrize("role", ["bos_token", "eos_token", "pad_token", "unk_token"])
def test_token_that_a_run_adds_and_the_embedding_has_not_is_refused(llama: Path, tmp_path: Path, role: str) -> None:
    add_token(llama, special=True)
    change_json(llama / "tokenizer_config.json", **{role: "<far>"})
    with pytest.raises(UnsupportedModel, match=rf"its {role} is '<far>' with the number 5000") as caught:
        inspect(str(llama), cache=tmp_path)
    assert caught.value.param == "model"


def test_token_that_a_template_writes_and_the_embedding_has_not_is_refused(llama: Path, tmp_path: Path) -> None:
    add_token(llama, special=True)
    (llama / "chat_template.jinja").write_text("<far>{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(UnsupportedModel, match="the chat template writes '<far>' with the number 5000"):
        inspect(str(llama), cache=tmp_path)


def test_control_token_that_nobody_writes_may_lie_beyond_the_embedding(llama: Path, tmp_path: Path) -> None:
    """Gemma 3 1B has one for images; a text that holds it is refused as a row."""
    add_token(llama, special=True)
    inspect(str(llama), cache=tmp_path)
    template = Template(load_tokenizer(llama))
    assert template.control_token_fault("a <far> b", "prompt").code == "special_token_in_text"


@pytest.mark.parametrize("length", [10**18, 10**400, 0, -5])
def test_context_of_a_length_that_cannot_be_is_refused(llama: Path, length: int) -> None:
    change_json(llama / "config.json", max_position_embeddings=length)
    with pytest.raises(UnsupportedModel, match=r"max_position_embeddings = -?\d+…?, and a context has 1 to"):
        examine(llama)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_attention_heads", 0), ("num_attention_heads", -4), ("num_key_value_heads", 0), ("hidden_size", 0),
        ("hidden_size", -64), ("hidden_size", "64"), ("vocab_size", 0), ("num_hidden_layers", 0),
        ("num_hidden_layers", -1), ("intermediate_size", -1), ("head_dim", 1.5), ("vocab_size", True),
    ],
)  # fmt: skip
def test_number_that_no_model_can_be_built_with_is_named(llama: Path, name: str, value: object) -> None:
    change_json(llama / "config.json", **{name: value})
    with pytest.raises(
        UnsupportedModel, match=rf"^config\.json says {name} = {value!r}, and it is a number from [01] on"
    ):
        examine(llama)


def test_heads_that_do_not_share_their_keys_evenly_are_named(llama: Path) -> None:
    change_json(llama / "config.json", num_attention_heads=4, num_key_value_heads=3)
    with pytest.raises(UnsupportedModel, match="num_attention_heads = 4 and num_key_value_heads = 3, and the first is"):
        examine(llama)


@pytest.mark.parametrize("name", ["factor", "low_freq_factor", "rope_theta"])
@pytest.mark.parametrize("value", [0, -1.0, float("inf"), "8", [1.0, "8"]])
def test_number_of_rotary_positions_that_cannot_be_is_named(llama: Path, name: str, value: object) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    change_json(llama / "config.json", rope_parameters=rope | {"original_max_position_embeddings": 64, name: value})
    with pytest.raises(UnsupportedModel, match=rf"^config\.json says {name} = .*, and it is a number above 0"):
        examine(llama)


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ({"hidden_act": "nothing"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "nothing", "rope_theta": 1e4}}, "rope_parameters.rope_type"),
    ],
)
def test_name_that_transformers_does_not_know_is_told_with_its_entry(
    llama: Path, said: dict[str, object], name: str
) -> None:
    change_json(llama / "config.json", **said)
    with pytest.raises(UnsupportedModel, match=rf"^config\.json says {name} = 'nothing', which transformers"):
        examine(llama)


def test_model_whose_answer_is_always_zero_is_not_called_an_encoder(llama: Path) -> None:
    change_json(llama / "config.json", rms_norm_eps=float("inf"))
    with pytest.raises(UnsupportedModel, match="nothing but zeros"):
        examine(llama)


def test_older_name_of_longrope_is_refused_with_the_newer_one(tmp_path: Path) -> None:
    folder = make("phi3-longrope", tmp_path / "base")
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"] | {"rope_type": "longrope"}
    new = {"rope_scaling": {"type": "longrope"} | {n: rope[n] for n in ("short_factor", "long_factor")}}
    change_json(folder / "config.json", rope_parameters=None, original_max_position_embeddings=16, **new)
    examine(folder)
    change_json(folder / "config.json", rope_scaling=new["rope_scaling"] | {"type": "su"})
    with pytest.raises(UnsupportedModel, match=r"rope scaling 'su', .* write 'longrope'"):
        examine(folder)


@pytest.mark.parametrize(
    ("rope", "length"),
    [({"rope_type": "dynamic", "factor": 4.0}, 1024), ({"type": "dynamic", "factor": 1.5}, 384),
     ({"rope_type": "linear", "factor": 4.0}, 256), ({"rope_type": "dynamic", "factor": 1e9}, 256), (None, 256)],
)  # fmt: skip
def test_context_of_a_base_is_stretched_by_dynamic_ntk_only(llama: Path, rope: object, length: int) -> None:
    change_json(llama / "config.json", max_position_embeddings=256, rope_parameters=None, rope_scaling=rope)
    location = locate_base(str(llama), cache=llama)
    assert location.max_length == length
    check_length(location, length)
    with pytest.raises(SequenceTooLong, match=rf"above the {length} tokens that"):
        check_length(location, length + 1)


def test_numbers_that_overflow_are_not_called_an_encoder(llama: Path) -> None:
    change_json(llama / "config.json", rms_norm_eps=-1.0)
    with pytest.raises(UnsupportedModel, match="numbers that are not finite"):
        examine(llama)


def test_tokenizer_that_is_code_is_refused_without_the_folders_place(llama: Path) -> None:
    code = {"AutoTokenizer": ["mine.Tokenizer", None]}
    change_json(llama / "tokenizer_config.json", auto_map=code, tokenizer_class="MineTokenizer")
    with pytest.raises(UnsupportedModel, match="code of its own") as caught:
        load_tokenizer(llama)
    assert str(llama) not in caught.value.message


def test_error_in_an_architectures_own_initialization_is_a_refusal(tmp_path: Path) -> None:
    folder = make("recurrent_gemma", tmp_path / "base")
    change_json(folder / "config.json", w_init_variance_scale=-1.0)
    with pytest.raises(UnsupportedModel, match=r"compared with its config\.json: math domain error"):
        examine(folder)


@pytest.mark.parametrize(
    ("expression", "why"), [("(a+)+c", "expressions takes too long"), (r"a*a*\d", "takes more than")]
)
def test_tokenizer_whose_expression_goes_back_and_back_is_refused(
    llama: Path, expression: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is ended by Oniguruma; the second takes the third power of the letters, and cannot be ended."""
    monkeypatch.setattr(tokenizer_time, "MAX_SECONDS", 0.05)
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    change_json(llama / "tokenizer.json", pre_tokenizer=split)
    with pytest.raises(UnsupportedModel, match=why):
        load_tokenizer(llama)
