"""What one entry of the zoo is: how its folder is made, and what should become of a job on it."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from tests.lorainit.conftest import make_tokenizer

Family = Literal["dense", "mixture", "hybrid", "not causal", "vision", "incomplete", "hostile"]
Expected = Literal["trains", "refused"]

# Tokens that a row must exceed to reach past every window, chunk and original context of these configurations.
REACH = 24
MAX_LENGTH = 256
COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,  # whole blocks of NF4
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LENGTH,
    "initializer_range": 0.15,  # so that logits are not flat
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Kind:
    """One kind of base model.

    `make` fills an existing empty folder and returns what to pass as `source` (the folder, or a file in it).
    `missing` = why this transformers cannot build it (then it is not tried). `attention` = the stock one that is right.
    """

    make: Callable[[Path], Path]
    family: Family
    expected: Expected = "trains"
    notes: str = ""
    missing: str | None = None
    attention: str = "eager"


def of_config(name: str, family: Family, *, notes: str = "", attention: str = "eager", **values: Any) -> Kind:
    """The causal language model of the configuration class `name`, of random weights."""
    if not hasattr(transformers, name):
        why = f"transformers {transformers.__version__} has no {name}"
        return Kind(_cannot, family, notes=notes, missing=why)
    make = partial(_save_causal, name, values)
    return Kind(make, family, notes=notes, attention=attention)


def _save_causal(name: str, values: dict[str, Any], folder: Path) -> Path:
    return save(causal(getattr(transformers, name)(**values)), folder)


def _cannot(folder: Path) -> Path:
    raise LookupError(folder)


def causal(config: Any) -> nn.Module:
    """A random model; the same each time."""
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return shaken(model)


@torch.no_grad()
def shaken(model: nn.Module) -> nn.Module:
    """Norms are made as ones and biases as zeros; as such they could be left out unseen."""
    generator = torch.Generator().manual_seed(1)
    routing = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    for tensor in (*model.parameters(), *routing):
        if tensor.ndim == 1 or bool((tensor == tensor.flatten()[0]).all()):
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    return model.eval()


def save(model: Any, folder: Path) -> Path:
    """config.json, generation_config.json, model.safetensors and a fast tokenizer with a chat template."""
    model.save_pretrained(folder)
    for name, text in _tokenizer_files().items():
        (folder / name).write_text(text)
    return folder


@lru_cache(maxsize=1)
def _tokenizer_files() -> dict[str, str]:
    with tempfile.TemporaryDirectory() as name:
        make_tokenizer().save_pretrained(name)
        return {path.name: path.read_text() for path in Path(name).iterdir()}
