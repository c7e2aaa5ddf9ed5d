"""A Llama base and a LoRA as GGUF files, as llama.cpp's own converters lay them out.

Written after the format's description, and the same bytes as `convert_lora_to_gguf.py` writes (docs/log.md), which
comes in no small package. llama.cpp rotates neighbouring pairs of a head where transformers rotates its two halves, so
the rows of q and k are reordered; of an adapter those of B.
"""

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.torch import load_file

ARCH = gguf.MODEL_ARCH.LLAMA


def _reordered(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row (half, i) of each head becomes row (i, half)."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def _heads(name: str, config: dict) -> int | None:
    """How many heads the rows belong to, where they are rotated."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    return next((count for part, count in heads.items() if f".{part}." in name), None)


def write_base(folder: Path, path: Path) -> None:
    """The model in float32, with the vocabulary of its byte-level BPE."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCH])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(float(config.get("rope_theta") or config["rope_parameters"]["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    _add_vocabulary(writer, json.loads((folder / "tokenizer.json").read_text()), config["vocab_size"])
    names = gguf.get_tensor_name_map(ARCH, config["num_hidden_layers"])
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    for name, tensor in tensors.items():
        value = tensor.float().numpy()
        if heads := _heads(name, config):
            value = _reordered(value, heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(value))
    _write(writer)


def _add_vocabulary(writer: gguf.GGUFWriter, tokenizer: dict, size: int) -> None:
    pieces = {number: piece for piece, number in tokenizer["model"]["vocab"].items()}
    special = {entry["id"]: entry["content"] for entry in tokenizer["added_tokens"]}
    pieces |= special
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([pieces.get(i, f"[unused{i}]") for i in range(size)])
    kinds = gguf.TokenType
    writer.add_token_types(
        [kinds.CONTROL if i in special else kinds.NORMAL if i in pieces else kinds.UNUSED for i in range(size)]
    )
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(2)


def write_adapter(base: Path, adapter: Path, path: Path) -> None:
    """The adapter for `write_base(base)`. One alpha for all layers is what the format has."""
    config = json.loads((base / "config.json").read_text())
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCH])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(
        gguf.Keys.Adapter.LORA_ALPHA, json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"]
    )
    names = gguf.get_tensor_name_map(ARCH, config["num_hidden_layers"])
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        module, _, factor = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        value = tensor.float().numpy()
        if factor == "B" and (heads := _heads(f"{module}.", config)):
            value = _reordered(value, heads)
        target = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        writer.add_tensor(f"{target}.lora_{factor.lower()}", np.ascontiguousarray(value))
    _write(writer)


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
