"""What must be refused when it is inspected: not causal, not text only, not all there, or made to do harm."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.zoo.dense import DENSE
from tests.zoo.kind import COMMON, Expected, Family, Kind, save, shaken

_TEXT = {k: COMMON[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                "num_attention_heads", "max_position_embeddings", "initializer_range",
                                "pad_token_id", "bos_token_id", "eos_token_id")}  # fmt: skip
_SEQ2SEQ = {"vocab_size": 320, "d_model": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            "decoder_start_token_id": 2}  # fmt: skip
_BART = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
         "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 256, "init_std": 0.15}  # fmt: skip
_SIGLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
           "image_size": 16, "patch_size": 8}  # fmt: skip
_GROUPED = {**_TEXT, "num_key_value_heads": 2}


def _model(model: str, config: str, family: Family, notes: str = "", **values: Any) -> Kind:
    """Any model class of transformers from any configuration class, of random weights."""

    def make(folder: Path) -> Path:
        torch.manual_seed(0)
        made = getattr(transformers, model)(getattr(transformers, config)(**values))
        return save(shaken(made.float()), folder)

    return Kind(make, family, "refused", notes)


def _vision(model: str, config: str, text: dict[str, Any], vision: dict[str, Any], **more: Any) -> Kind:
    notes = "text and vision in one model"
    return _model(model, config, "vision", notes, text_config=text, vision_config=vision, **more)


NOT_CAUSAL: dict[str, Kind] = {
    "bert": _model("BertLMHeadModel", "BertConfig", "not causal", "without is_decoder: every token sees every other",
                   **_TEXT),
    "bert-masked": _model("BertForMaskedLM", "BertConfig", "not causal", "as most BERTs are stored", **_TEXT),
    "bert-decoder": Kind(
        _model("BertLMHeadModel", "BertConfig", "not causal", is_decoder=True, **_TEXT).make, "dense", "trains",
        "with is_decoder it is causal, learned positions, post-norm",
    ),
    "roberta": _model("RobertaForCausalLM", "RobertaConfig", "not causal", "without is_decoder", **_TEXT),
    "bart": _model("BartForConditionalGeneration", "BartConfig", "not causal", "encoder and decoder", **_SEQ2SEQ,
                   **_BART),
    "t5": _model("T5ForConditionalGeneration", "T5Config", "not causal", "encoder and decoder", d_kv=16, d_ff=128,
                 num_layers=2,
                 num_heads=4, **_SEQ2SEQ),
    "llama-classifier": _model("LlamaForSequenceClassification", "LlamaConfig", "not causal",
                               "a classifier's head: no output embedding in the file", **_GROUPED),
}  # fmt: skip

VISION: dict[str, Kind] = {
    "qwen2_vl": _vision("Qwen2VLForConditionalGeneration", "Qwen2VLConfig",
                        {**_GROUPED, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                         "mrope_section": [2, 3, 3]}},
                        {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 8},
                        image_token_id=5, video_token_id=6, vision_start_token_id=7, vision_end_token_id=8),
    "llava": _vision("LlavaForConditionalGeneration", "LlavaConfig", {"model_type": "llama", **_GROUPED},
                     {"model_type": "clip_vision_model", **_SIGLIP, "projection_dim": 32}, image_token_index=5),
    "mistral3": _vision("Mistral3ForConditionalGeneration", "Mistral3Config", {"model_type": "mistral", **_GROUPED},
                        {"model_type": "pixtral", **_SIGLIP}, image_token_index=5),
    # What Gemma 3 is on the hub from 4B on: AutoModelForCausalLM loads it, vision tower and all.
    "gemma3-vision": Kind(
        _vision("Gemma3ForConditionalGeneration", "Gemma3Config",
                {"model_type": "gemma3_text", **_GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16,
                 "sliding_window": 16,
                 "layer_types": ["sliding_attention", "full_attention"]},
                {"model_type": "siglip_vision_model", **_SIGLIP}, image_token_index=5, boi_token_index=6,
                eoi_token_index=7,
                mm_tokens_per_image=4).make,
        "vision", "trains", "trained as text; the vision tower gets no LoRA",
    ),
}  # fmt: skip


# --- incomplete ---------------------------------------------------------------------------------


def _changed(change: Callable[[Path, dict[str, torch.Tensor]], None]) -> Callable[[Path], Path]:
    """A Llama's folder after `change(folder, weights)`; what it leaves in `weights` is written back."""

    def make(folder: Path) -> Path:
        DENSE["llama"].make(folder)
        weights = load_file(folder / "model.safetensors")
        change(folder, weights)
        if weights:
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def _drop(*words: str) -> Callable[[Path, dict[str, torch.Tensor]], None]:
    def change(folder: Path, weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if any(word in name for word in words)]:
            del weights[name]

    return change


def _add(name: str) -> Callable[[Path, dict[str, torch.Tensor]], None]:
    return lambda folder, weights: weights.update({name: torch.ones(64, 64)})


def _misshape(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name][:-8].clone()


def _lose_a_shard(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """An index that names two files, of which one is there."""
    names = sorted(weights)
    files = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    where = {name: files[i * 2 // len(names)] for i, name in enumerate(names)}
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({n: weights[n] for n in names if where[n] == files[0]}, folder / files[0], metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    weights.clear()


def _incomplete(change: Callable[[Path, dict[str, torch.Tensor]], None], notes: str) -> Kind:
    return Kind(_changed(change), "incomplete", "refused", notes)


INCOMPLETE: dict[str, Kind] = {
    "missing-mlp": _incomplete(_drop("layers.1.mlp."), "the second layer's MLP is not in the file"),
    "missing-norm": _incomplete(_drop("layers.0.input_layernorm"), "one norm is not in the file"),
    "missing-head": _incomplete(_drop("lm_head"), "an output head that is not tied, and not in the file"),
    "extra-weight": _incomplete(_add("model.layers.0.mlp.third_proj.weight"),
                                "a weight that the architecture has no use for"),
    "extra-layer": _incomplete(_add("model.layers.2.mlp.up_proj.weight"), "a weight of a layer beyond the last"),
    "wrong-shape": _incomplete(_misshape, "one matrix is eight rows short"),
    "missing-shard": _incomplete(_lose_a_shard, "the index names a file that is not there"),
}  # fmt: skip


# --- hostile ------------------------------------------------------------------------------------


def _config(text: str | None = None, **values: Any) -> Callable[[Path, dict[str, torch.Tensor]], None]:
    def change(folder: Path, weights: dict[str, torch.Tensor]) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values) if text is None else text)

    return change


def _file(name: str, content: bytes) -> Callable[[Path, dict[str, torch.Tensor]], None]:
    def change(folder: Path, weights: dict[str, torch.Tensor]) -> None:
        (folder / name).write_bytes(content)
        weights.clear()

    return change


def _header(value: Any, data: bytes = b"") -> bytes:
    """A safetensors file of this header."""
    text = json.dumps(value).encode()
    return struct.pack("<Q", len(text)) + text + data


def _gguf(content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / "model.gguf"
        path.write_bytes(content)
        return path

    return make


def _hostile(
    change: Callable[[Path, dict[str, torch.Tensor]], None], notes: str, expected: Expected = "refused"
) -> Kind:
    return Kind(_changed(change), "hostile", expected, notes)


_DEEP = "[" * 100_000 + "]" * 100_000
_WEIGHTS = "model.safetensors"
_FAR = {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 1 << 42]}

HOSTILE: dict[str, Kind] = {
    "many-layers": _hostile(_config(num_hidden_layers=1_000_000_000), "num_hidden_layers 1e9"),
    "wide-layers": _hostile(_config(hidden_size=1 << 40, intermediate_size=1 << 40), "hidden_size 2⁴⁰"),
    "many-heads": _hostile(_config(num_attention_heads=0), "no heads: a division by zero"),
    "large-vocabulary": _hostile(_config(vocab_size=1 << 40), "vocab_size 2⁴⁰"),
    "words-for-numbers": _hostile(_config(hidden_size="64"), "a string where a number belongs"),
    "odd-type": _hostile(_config(model_type=["llama"]), "model_type is a list"),
    "own-code": _hostile(_config(model_type="mine", auto_map={"AutoConfig": "mine.Config",
                                                              "AutoModelForCausalLM": "mine.M"}),
                         "asks for code of its own"),
    "quantized": _hostile(_config(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 64}),
                          "quantized in its files"),
    "deep-config": _hostile(_config('{"model_type": "llama", "x": ' + _DEEP + "}"), "config.json nested 100,000 deep"),
    "not-json-config": _hostile(_config("llama"), "config.json is not JSON"),
    "list-config": _hostile(_config("[]"), "config.json is a list"),
    "deep-tokenizer": _hostile(_file("tokenizer.json", _DEEP.encode()), "tokenizer.json nested 100,000 deep"),
    "odd-tokenizer": _hostile(_file("tokenizer.json",
                                    b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": ["x"]}}'),
                              "a tokenizer that makes no sense"),
    "long-header": _hostile(_file(_WEIGHTS, struct.pack("<Q", 1 << 62) + b"{}"), "a safetensors header of 2⁶² bytes"),
    "cut-header": _hostile(_file(_WEIGHTS, struct.pack("<Q", 100) + b'{"a": '), "a safetensors header that is cut off"),
    "deep-header": _hostile(_file(_WEIGHTS, struct.pack("<Q", 200_000) + _DEEP.encode()),
                            "a safetensors header nested 100,000 deep"),
    "far-offsets": _hostile(_file(_WEIGHTS, _header({"model.embed_tokens.weight": _FAR})),
                            "offsets beyond the end of the file"),
    "no-tensors": _hostile(_file(_WEIGHTS, _header({})), "a safetensors file without tensors"),
    "empty-weights": _hostile(_file(_WEIGHTS, b""), "a safetensors file without a byte"),
    "gguf-tensors": Kind(_gguf(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0)), "hostile", "refused",
                         "a GGUF header of 2⁶⁰ tensors"),
    "gguf-keys": Kind(_gguf(b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60)), "hostile", "refused",
                      "a GGUF header of 2⁶⁰ keys"),
    "gguf-long-key": Kind(_gguf(b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 1 << 60) + b"x"), "hostile", "refused",
                          "a GGUF key of 2⁶⁰ bytes"),
    "gguf-cut": Kind(_gguf(b"GGUF\x03\x00"), "hostile", "refused", "a GGUF file of six bytes"),
    "gguf-empty": Kind(_gguf(b""), "hostile", "refused", "a GGUF file without a byte"),
}  # fmt: skip
