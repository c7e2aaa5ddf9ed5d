"""NF4 bases: linear layers whose weights are held in four bits, by bitsandbytes.

transformers' own loader makes them, one layer at a time, so that a GPU never holds the full base and
the quantized one is bit for bit what anybody gets who loads the untouched model in NF4: blocks of 64,
no double quantization (Dettmers et al., "QLoRA", arXiv 2305.14314, section 3). Which layers they are is
decided in `lorainit.model.targets.four_bits`. The only module that
knows bitsandbytes, which is imported when a layer is quantized (docs/decisions/0010). Knows nothing of
methods, training or files.
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

# Relative difference that is rounding; weights that were read in the wrong order differ by 1.4.
ROUNDING = 1e-2
PACKED_ROWS = 32  # what bitsandbytes repacks for a CPU has so many rows, or a multiple of them


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
        skip: `llm_int8_skip_modules`; None = what transformers leaves as it is.
    """
    config = BitsAndBytesConfig(**nf4_config(skip), bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": config, "device_map": {"": device}}


def nf4_config(skip: Sequence[str] | None) -> dict[str, Any]:
    """The arguments of `BitsAndBytesConfig` with which anybody gets the base, but for the number format."""
    found: dict[str, Any] = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
    }
    return found if skip is None else {**found, "llm_int8_skip_modules": list(skip)}


def is_quantized(module: nn.Module) -> bool:
    """Whether the module's weight is held in four bits."""
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None


def dequantized(module: nn.Module) -> Tensor:
    """The weight of a quantized module as its forward pass uses it, out×in, in the run's dtype; a copy."""
    from bitsandbytes.functional import dequantize_4bit

    weight: Any = module.weight
    found: Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return found


def settle(model: nn.Module) -> None:
    """Make a freshly quantized model one whose weights stay as they are and can be read back.

    On CPUs with AVX512-BF16 bitsandbytes would repack each weight at its first forward pass in
    evaluation mode: block sizes rounded to bf16, activations too, and dequantizing it afterwards
    gives garbage. Weights whose rows are no multiple of `PACKED_ROWS` it refuses with an AssertionError.

    Raises:
        UnsupportedModel: blocks would run over the rows of a layer.
        InitFailed: the weight read back is not the one a forward pass multiplies with.
    """
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if is_quantized(module)}
    for name, layer in layers.items():
        if layer.in_features % NF4_BLOCK:
            # bitsandbytes' CPU kernels take every row to begin a block: they would read other weights.
            raise UnsupportedModel(
                f"{name} has {layer.in_features} inputs, and NF4 needs a multiple of its block size, {NF4_BLOCK}.",
                param="lora.quantization",
            )
        layer.support_avx512bf16_for_cpu = False
    for name, layer in islice(layers.items(), 1):
        _verify(name, layer)


@torch.no_grad()
def _verify(name: str, layer: Any) -> None:
    """Push the identity through the layer and compare with the weight read back afterwards."""
    eye = torch.eye(layer.in_features, dtype=layer.compute_dtype, device=layer.weight.device)
    used = layer(eye)
    read = F.linear(eye, dequantized(layer), layer.bias)
    if not torch.linalg.vector_norm(used - read) <= ROUNDING * torch.linalg.vector_norm(read):
        raise InitFailed(
            f"{name}: the dequantized weight is not the one that the forward pass uses; this bitsandbytes does not"
            " suit this machine.",
            param="lora.quantization",
        )
