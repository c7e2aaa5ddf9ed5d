"""How much memory another copy of a base takes, beside what lies there already: an estimate, made before it is loaded.

Held against measured peaks by tests/pretended/test_memory.py. What training takes is tried instead
(`lorainit.train.memory`).
"""

from typing import Any

import torch
from torch import nn

from lorainit.model.layers.decoder_layers import listed_layers

# Of each logit that a served form of the adapter makes: as computed, chosen and in float32, and its log-probability.
LOGIT = 12
FLOAT64, FLOAT32 = 8, 4
# Activations, and what an allocator rounds up.
MARGIN = 1.2


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights as they are held."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def copy_bytes(model: Any, *, tokens: int, factors: int) -> float:
    """Bytes for a copy of `model` with an adapter on it, and for comparing the two.

    That is the weights and factors; then a decoder layer of both or the output head in float64, or one row's logits.

    Args:
        tokens: of the longest row that goes through it.
        factors: numbers of the adapter, which stock PEFT holds in float32.
    """
    layers, head = listed_layers(model), model.get_output_embeddings()
    in_a_layer = max((_numbers(layer) for layer in layers), default=0) + factors / max(1, len(layers))
    logits: int = LOGIT * tokens * model.config.get_text_config().vocab_size
    passing = max(FLOAT64 * in_a_layer, FLOAT64 * _numbers(head) if head else 0, logits)
    return MARGIN * (weight_bytes(model) + FLOAT32 * factors + passing)


def _numbers(module: nn.Module) -> int:
    """Numbers that a module's weights stand for; two to a byte where they are in four bits."""
    return sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in module.parameters())
