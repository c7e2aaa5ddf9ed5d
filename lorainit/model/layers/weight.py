"""A linear layer's weight and shape, in whatever form the base model stores it."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorainit.model.layers.quantize import dequantize, is_quantized


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear module as out×in. transformers' `Conv1D` stores in×out, and an NF4 layer four bits."""
    if is_quantized(module):
        return dequantize(module)
    weight = module.weight
    assert isinstance(weight, Tensor)
    if hasattr(weight, "full_tensor"):  # sharded, and outside of a pass: all processes must call this together
        weight = weight.full_tensor()
    return weight.T if isinstance(module, Conv1D) else weight


def device_of(module: nn.Module) -> torch.device:
    """The device of a linear module's weight."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.device


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear module, whatever form its weight has."""
    names = ("nf", "nx") if isinstance(module, Conv1D) else ("out_features", "in_features")
    out, n = (getattr(module, name) for name in names)
    return out, n


def was_conv1d(module: nn.Module) -> bool:
    """Whether a linear module is a `Conv1D` in the base's files. An NF4 layer knows the class that it replaced."""
    return issubclass(getattr(module, "source_cls", type(module)), Conv1D)
