"""Estimates how much memory another copy of a base takes, before it is loaded.

tests/pretended/test_memory.py compares the estimate with measured peaks. The memory of training is not estimated but
measured by a dry run (`lorainit.train.memory`).
"""

from typing import Any

import torch
from torch import nn

from lorainit.model.layers.decoder_layers import listed_layers

# Bytes for each logit when a way of serving is measured: the logit as computed, the selected one, its float32 copy and
# its log-probability.
LOGIT = 12
FLOAT64, FLOAT32 = 8, 4
# A margin for activations and for the rounding of the allocator.
MARGIN = 1.2


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights in their present format."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def copy_bytes(model: Any, *, tokens: int, factors: int) -> float:
    """Bytes for a copy of `model` with an adapter on it, and for comparing the two.

    These are the weights and factors, and the largest of: one decoder layer with its factors in float64, the output
    head in float64, the logits of one row.

    Args:
        tokens: the length of the longest row that is run.
        factors: how many numbers the adapter has, which stock PEFT holds in float32.
    """
    layers, head = listed_layers(model), model.get_output_embeddings()
    in_a_layer = max((_numbers(layer) for layer in layers), default=0) + factors / max(1, len(layers))
    logits: int = LOGIT * tokens * model.config.get_text_config().vocab_size
    passing = max(FLOAT64 * in_a_layer, FLOAT64 * _numbers(head) if head else 0, logits)
    return MARGIN * (weight_bytes(model) + FLOAT32 * factors + passing)


def _numbers(module: nn.Module) -> int:
    """How many numbers a module's weights represent; a byte holds two of them in four bits."""
    return sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in module.parameters())
