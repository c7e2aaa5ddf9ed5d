"""NF4 bases: linear layers whose weights are held in four bits, by bitsandbytes.

transformers' own loader makes them, one layer at a time. So a GPU never holds the full base, and the quantized base is
bit for bit what a user gets who loads the untouched model in NF4: blocks of 64, no double quantization (Dettmers et
al., "QLoRA", arXiv 2305.14314, section 3). `lorainit.model.targets.four_bits` decides which layers are quantized.
Only this module uses bitsandbytes, and imports it when it is needed, because it is an optional package
(docs/decisions/0010).
"""

import importlib.util
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from transformers import BitsAndBytesConfig

from lorainit.config.errors import InitFailed, UnsupportedModel
from lorainit.config.model_facts import NF4_BLOCK

# Relative differences up to this are rounding. Weights that are read in the wrong order differ by 1.4.
ROUNDING = 1e-2
PACKED_ROWS = 32  # bitsandbytes can repack a weight for a CPU only if its number of rows is a multiple of this


def require_library() -> None:
    """Raise `UnsupportedModel` where bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UnsupportedModel(
            'A base in NF4 needs bitsandbytes, which is not installed here: pip install "lorainit[quantized]".',
            param="lora.quantization",
        )


def loading_options(*, dtype: torch.dtype, device: torch.device, skip: Sequence[str] | None) -> dict[str, Any]:
    """What `from_pretrained` needs to load a full-precision model in NF4, computing in `dtype`, on `device`.

    Args:
        skip: `llm_int8_skip_modules`; None = the modules that transformers skips by default.
    """
    config = BitsAndBytesConfig(**nf4_config(skip), bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": config, "device_map": {"": device}}


def nf4_config(skip: Sequence[str] | None) -> dict[str, Any]:
    """The arguments of `BitsAndBytesConfig` with which a user gets the same base, except the format of computation."""
    found: dict[str, Any] = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
    }
    return found if skip is None else {**found, "llm_int8_skip_modules": list(skip)}


def is_quantized(module: nn.Module) -> bool:
    """Whether the module's weight is held in four bits."""
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None


def dequantize(module: nn.Module) -> Tensor:
    """A copy of a quantized module's weight as its forward pass uses it, out×in, in the run's dtype."""
    from bitsandbytes.functional import dequantize_4bit

    weight: Any = module.weight
    found: Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return found


def settle(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking the weights of a freshly quantized model, and check that they can be read back.

    On CPUs with AVX512-BF16 bitsandbytes would repack each weight at its first forward pass in evaluation mode. That
    rounds block scales and activations to bf16, and dequantizing the weight afterwards gives garbage. A weight whose
    number of rows is no multiple of `PACKED_ROWS` would even end with an AssertionError.

    Raises:
        UnsupportedModel: blocks would run over the rows of a layer.
        InitFailed: the weight read back is not the one a forward pass multiplies with.
    """
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if is_quantized(module)}
    for name, layer in layers.items():
        if layer.in_features % NF4_BLOCK:
            # Refused, because bitsandbytes' CPU kernels assume that a block begins with each row. They would use wrong
            # weights without an error.
            raise UnsupportedModel(
                f"{name} has {layer.in_features} inputs, and NF4 needs a multiple of its block size, {NF4_BLOCK}.",
                param="lora.quantization",
            )
        layer.support_avx512bf16_for_cpu = False
    for name, layer in islice(layers.items(), 1):
        _verify(name, layer)


@torch.no_grad()
def _verify(name: str, layer: Any) -> None:
    """Run the identity matrix through the layer and compare the result with the dequantized weight."""
    eye = torch.eye(layer.in_features, dtype=layer.compute_dtype, device=layer.weight.device)
    used = layer(eye)
    read = F.linear(eye, dequantize(layer), layer.bias)
    if not torch.linalg.vector_norm(used - read) <= ROUNDING * torch.linalg.vector_norm(read):
        raise InitFailed(
            f"{name}: the dequantized weight is not the one that the forward pass uses; this bitsandbytes does not"
            " suit this machine.",
            param="lora.quantization",
        )
