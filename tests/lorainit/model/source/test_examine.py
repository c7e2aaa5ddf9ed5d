"""What may be trained is decided before anything is loaded: every kind of the zoo, and what tests/zoo does not have."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorainit.config.errors import UnsupportedModel
from lorainit.model.inspect import inspect
from lorainit.model.load import load_model, locate_base
from lorainit.model.source.examine import examine
from tests.lorainit.conftest import change_json
from tests.zoo.bases import KINDS, make

TRAIN = [name for name, kind in KINDS.items() if kind.expected == "trains" and not kind.missing]
# What is different in kind: names and forms of layers, windows, experts, state-space layers, a tower. The rest is slow.
USUAL = {
    "llama3", "gemma2", "gemma3n", "phi3-longrope", "gpt2", "gptj", "opt-narrow", "mpt", "bert-decoder", "mixtral",
    "qwen2_moe", "deepseek_v3", "gpt_oss", "llama4", "mamba2", "jamba", "lfm2", "qwen3_5", "gemma3-vision",
}  # fmt: skip
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
    "many-heads": r"config\.json says num_attention_heads = 0, and it is a number from 1 on",
    "large-vocabulary": r"vocab_size = 1099511627776",
    "words-for-numbers": r"config\.json says hidden_size = '64', and it is a number from 1 on",
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


@pytest.mark.parametrize(
    "kind", [kind if kind in USUAL else pytest.param(kind, marks=pytest.mark.slow) for kind in TRAIN]
)
def test_what_can_be_trained_is_not_refused(kind: str, tmp_path: Path) -> None:
    folder = make(kind, tmp_path / kind)
    examine(locate_base(str(folder), cache=tmp_path).folder)
    load_model(folder, dtype=torch.float32, device=CPU)


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
