"""What may be trained is decided before anything is loaded: every kind of the zoo, and what tests/zoo does not have."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers

from lorainit.encode import Encoder
from lorainit.errors import SequenceTooLong, UnsupportedModel
from lorainit.inspect import inspect
from lorainit.model import tokenizer_time
from lorainit.model.examine import examine
from lorainit.model.load import check_length, load_model, load_tokenizer, locate
from lorainit.refusal import as_unsupported
from lorainit.template import Template
from lorainit.turns import Span
from tests.lorainit.conftest import make_tokenizer
from tests.zoo.bases import KINDS, make

TRAIN = [name for name, kind in KINDS.items() if kind.expected == "trains" and not kind.missing]
CPU = torch.device("cpu")

# The essence of the sentence that each is refused with.
REASONS = {
    "bert": r"\(bert\) is not a causal language model.*tokens behind it",
    "bert-masked": r"\(bert\) is not a causal language model.*tokens behind it",
    "roberta": r"\(roberta\) is not a causal language model",
    "bart": r"\(bart\) is an encoder and a decoder",
    "t5": r"\(t5\) is an encoder and a decoder",
    "llama-classifier": r"lack 1 weight of the model: lm_head\.weight",
    "qwen2_vl": r"\(qwen2_vl\) is text and vision in one model",
    "llava": r"\(llava\) is text and vision in one model",
    "mistral3": r"\(mistral3\) is text and vision in one model",
    "missing-mlp": r"lack 3 weights of the model: model\.layers\.1\.mlp\.down_proj\.weight",
    "missing-norm": r"lack 1 weight of the model: model\.layers\.0\.input_layernorm\.weight",
    "missing-head": r"lack 1 weight of the model: lm_head\.weight",
    "extra-weight": r"hold 1 weight .* no use for: model\.layers\.0\.mlp\.third_proj\.weight",
    "extra-layer": r"hold 1 weight .* no use for: model\.layers\.2\.mlp\.up_proj\.weight",
    "wrong-shape": r"model\.layers\.1\.mlp\.up_proj\.weight has \[120, 64\] where \[128, 64\] is wanted",
    "missing-shard": r"names model-00002-of-00002\.safetensors, which is not there",
    "many-layers": r"num_hidden_layers = 1000000000",
    "wide-layers": r"hidden_size = 1099511627776",
    "many-heads": r"config\.json cannot be read: integer modulo by zero",
    "large-vocabulary": r"vocab_size = 1099511627776",
    "words-for-numbers": r"'hidden_size' expected int, got str",
    "odd-type": r"does not say which model_type",
    "own-code": r"architecture 'mine', which transformers [\d.]+ does not have; .*code of its own",
    "quantized": r"is quantized",
    "deep-config": r"config\.json is nested too deep",
    "not-json-config": r"config\.json is not JSON",
    "list-config": r"config\.json is not a JSON object",
    "deep-tokenizer": r"tokenizer cannot be loaded: .*recursion",
    "odd-tokenizer": r"tokenizer cannot be loaded",
    "long-header": r"header is longer than the file",
    "cut-header": r"header is longer than the file",
    "deep-header": r"header of model\.safetensors is nested too deep",
    "far-offsets": r"describes 4398046511104 bytes of weights, and 0 are there",
    "no-tensors": r"the files hold 0 weights",
    "empty-weights": r"it has no header",
    "gguf-tensors": r"1152921504606846976 tensors",
    "gguf-keys": r"1152921504606846976 keys",
    "gguf-long-key": r"a text of 1152921504606846976 bytes",
    "gguf-cut": r"ends in the middle of its header",
    "gguf-empty": r"ends in the middle of its header",
}


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.expected == "refused"])
def test_what_cannot_be_trained_is_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    source = make(kind, tmp_path / kind)
    with pytest.raises(UnsupportedModel, match=REASONS[kind]) as caught:
        inspect(str(source), cache=tmp_path / "cache")
    assert caught.value.param == "model"
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("kind", TRAIN)
def test_what_can_be_trained_is_not_refused(kind: str, tmp_path: Path) -> None:
    folder = make(kind, tmp_path / kind)
    examine(locate(str(folder), cache=tmp_path).folder)
    load_model(folder, dtype=torch.float32, device=CPU)


# --- files ---------------------------------------------------------------------------------------


@pytest.fixture
def llama(bases: dict[str, Path], tmp_path: Path) -> Path:
    """A whole tiny Llama, to be spoiled."""
    return Path(shutil.copytree(bases["llama"], tmp_path / "spoiled"))


def write_header(folder: Path, header: object, data: int) -> None:
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "text"),
    [
        ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, 12, "b does not begin where the tensor before it ends"),
        ({"a": entry(0, 8, [2]), "b": entry(12, 20, [2])}, 20, "b does not begin where"),
        ({"a": entry(0, 8, [2])}, 12, "describes 8 bytes of weights, and 12 are there"),
        ({"a": entry(0, 8, [3])}, 8, "the entry of a makes no sense"),
        ({"a": entry(0, 8, [2], "F33")}, 8, "the entry of a makes no sense"),
        ({"a": entry(0, 8, [-2])}, 8, "the entry of a makes no sense"),
        ({"a": entry(0, 8, [1 << 40] * 1000)}, 8, "the entry of a makes no sense"),
        ({"a": [1]}, 8, "the entry of a makes no sense"),
        ({"a": entry(0, 2, [2], "F8_E4M3")}, 2, "a is quantized"),
    ],
)
def test_header_that_does_not_describe_its_file_is_refused(llama: Path, header: object, data: int, text: str) -> None:
    write_header(llama, header, data)
    with pytest.raises(UnsupportedModel, match=text):
        examine(llama)


def test_pipe_in_a_folder_is_refused_and_not_waited_for(llama: Path) -> None:
    (llama / "tokenizer.json").unlink()
    os.mkfifo(llama / "tokenizer.json")
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.json is not a plain file"):
        examine(llama)


def test_link_to_itself_is_refused(llama: Path) -> None:
    (llama / "tokenizer_config.json").unlink()
    (llama / "tokenizer_config.json").symlink_to("tokenizer_config.json")
    with pytest.raises(UnsupportedModel, match=r"tokenizer_config\.json cannot be read"):
        examine(llama)


def test_source_that_is_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UnsupportedModel, match="no base model"):
        locate(str(tmp_path / "loop"), cache=tmp_path)


def test_file_too_large_to_read_is_refused_unread(llama: Path) -> None:
    with (llama / "tokenizer.json").open("r+b") as stream:
        stream.truncate(1 << 40)  # a hole: it takes no room
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.json has 1099511627776 bytes"):
        examine(llama)


def test_adapter_is_no_base_although_it_names_one(llama: Path, bases: dict[str, Path]) -> None:
    (llama / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(bases["gpt2"])}))
    with pytest.raises(UnsupportedModel, match="is a PEFT adapter"):
        examine(llama)


@pytest.mark.parametrize("where", ["../other.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_index_that_leaves_its_folder_is_refused(llama: Path, where: str) -> None:
    (llama / "model.safetensors").rename(llama / "x.safetensors")
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": where}}))
    with pytest.raises(UnsupportedModel, match="not a file of this folder"):
        examine(llama)


def test_shard_without_what_the_index_promises_is_refused(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "x.safetensors")
    index = {"weight_map": {"lm_head.weight": "x.safetensors", "model.lost.weight": "x.safetensors"}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedModel, match=r"x\.safetensors lacks model\.lost\.weight"):
        examine(llama)


@pytest.mark.parametrize("change", [{"rms_norm_eps": "NaN"}, {"num_key_value_heads": -1}, {"hidden_act": "none"}])
def test_nonsense_in_a_config_is_a_refusal(llama: Path, change: dict[str, object]) -> None:
    config = json.loads((llama / "config.json").read_text()) | change
    (llama / "config.json").write_text(json.dumps(config).replace('"NaN"', "NaN"))
    with pytest.raises(UnsupportedModel, match=r"config\.json|cannot be"):
        examine(llama)


def test_facts_that_no_catalogue_takes_are_a_refusal(llama: Path, tmp_path: Path) -> None:
    config = json.loads((llama / "config.json").read_text()) | {"max_position_embeddings": 1}
    (llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="No catalogue can offer the base model: max_length"):
        inspect(str(llama), cache=tmp_path)


# --- weights -------------------------------------------------------------------------------------


def test_mixture_without_one_expert_is_refused(tmp_path: Path) -> None:
    folder = make("mixtral", tmp_path / "mixtral")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.1\.mlp\.experts\.down_proj has"):
        examine(folder)


def test_masks_that_old_versions_saved_are_no_weights(tmp_path: Path) -> None:
    folder = make("gptj", tmp_path / "old")
    weights = load_file(folder / "model.safetensors")
    weights |= {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    examine(folder)
    weights["transformer.h.0.attn.bias"] = torch.ones(64)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"no use for: transformer\.h\.0\.attn\.bias"):
        examine(folder)


def test_causal_masks_of_the_hubs_codegen_are_no_weights(tmp_path: Path) -> None:
    folder = make("codegen", tmp_path / "old")
    change_weights(folder, {"transformer.h.0.attn.causal_mask": torch.ones(1, 1, 8, 8).tril().bool()})
    examine(folder)
    change_weights(folder, {"transformer.h.0.attn.causal_mask": torch.ones(64)})
    with pytest.raises(UnsupportedModel, match=r"no use for: transformer\.h\.0\.attn\.causal_mask"):
        examine(folder)


def change_weights(folder: Path, change: dict[str, torch.Tensor]) -> None:
    weights = load_file(folder / "model.safetensors") | change
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_head_beside_the_embedding_that_it_is_tied_to_must_be_the_same(tmp_path: Path) -> None:
    """transformers 5 takes the file's head, transformers 4.48 and 4.57 the embedding."""
    folder = make("llama3", tmp_path / "tied")
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change_weights(folder, {"lm_head.weight": table.clone()})
    examine(folder)
    head = table.clone()
    head[-1, -1] += 0.5  # in the last row that is read
    change_weights(folder, {"lm_head.weight": head})
    with pytest.raises(UnsupportedModel, match=r"ties lm_head\.weight to model\.embed_tokens.*Set tie_word_embeddings"):
        examine(folder)
    change_json(folder / "config.json", tie_word_embeddings=False)
    examine(folder)


def test_tied_weights_under_their_old_names_are_compared_too(tmp_path: Path) -> None:
    folder = make("gpt2", tmp_path / "old")
    weights = {name.removeprefix("transformer."): W for name, W in load_file(folder / "model.safetensors").items()}
    weights["lm_head.weight"] = weights["wte.weight"] * 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"different values \(lm_head\.weight, wte\.weight\)"):
        examine(folder)


def test_weight_under_two_names_is_refused(llama: Path) -> None:
    change_weights(llama, {"norm.weight": load_file(llama / "model.safetensors")["model.norm.weight"].clone()})
    with pytest.raises(UnsupportedModel, match=r"under two names: norm\.weight and model\.norm\.weight"):
        examine(llama)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int64, torch.complex64])
def test_weights_that_are_no_floating_point_numbers_are_refused(llama: Path, dtype: torch.dtype) -> None:
    W = load_file(llama / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    change_weights(llama, {"model.layers.0.mlp.up_proj.weight": (100 * W).to(dtype)})
    with pytest.raises(UnsupportedModel, match=r"up_proj\.weight is stored as .*floating point"):
        examine(llama)


@pytest.mark.parametrize("kind", ["missing-mlp", "extra-weight", "wrong-shape", "t5"])
def test_loading_refuses_what_inspecting_does(kind: str, tmp_path: Path) -> None:
    folder = make(kind, tmp_path / kind)
    with pytest.raises(UnsupportedModel):
        load_model(folder, dtype=torch.float32, device=CPU)


def test_size_of_a_base_does_not_matter_to_the_probe(llama: Path) -> None:
    # 70 billion parameters; the files are those of the tiny one, so it is the shapes that are refused, in seconds.
    config = json.loads((llama / "config.json").read_text())
    config |= {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 21, "num_attention_heads": 64}
    (llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=r"lack .* weights of the model"):
        examine(llama)


# --- libraries that trust their files --------------------------------------------------------------


PANICS: dict[str, dict[str, object]] = {
    "no-table": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "high-id": {"model": {"type": "BPE", "vocab": {"a": 4294967295, "b": 0}, "merges": [["a", "b"]]}},
    "long-prefix": {
        "model": {
            "type": "BPE",
            "vocab": {"a": 0, "b": 1, "ab": 2},
            "merges": [["a", "b"]],
            "continuing_subword_prefix": "##x",
        }
    },
    "short-table": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "CAAAAAEAAAACAAAA"}},
    "no-length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
}


@pytest.mark.parametrize("name", PANICS)
def test_panic_of_the_tokenizers_rust_code_is_a_refusal(name: str, llama: Path) -> None:
    path = llama / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | PANICS[name]))
    with pytest.raises(UnsupportedModel, match=r"tokenizer cannot (be loaded|read a text): \w"):
        load_tokenizer(llama)


def test_panic_at_a_row_of_the_data_is_a_refusal() -> None:
    tokenizer = make_tokenizer()
    encode = Encoder(tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.FixedLength(0)
    with pytest.raises(UnsupportedModel, match="cannot read a text: chunk size must be non-zero"):
        encode.text("abc", [Span(0, 3, False)])


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_the_machine_or_somebody_does_is_not_the_models_fault(error: BaseException) -> None:
    with pytest.raises(type(error)), as_unsupported("It"):
        raise error


# --- numbers beyond what there is ------------------------------------------------------------------


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


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
    location = locate(str(llama), cache=llama)
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
    ("expression", "why"), [("(a+)+c", "retry-limit-in-match over"), (r"a*a*\d", "takes more than")]
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
