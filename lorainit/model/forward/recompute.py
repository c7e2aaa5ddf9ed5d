"""Gradient checkpointing: keep only the input of each decoder layer and run the layer again in the backward pass.

It costs another forward pass and saves the activations of all layers but one. Values and gradients stay the same, bit
for bit. transformers' own switch is not used because it works in training mode only, and training mode would activate
the base's dropout.
"""

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def layers_of(model: nn.Module) -> list[Any]:
    """The decoder layers; empty where the architecture does not name them."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def recompute(model: nn.Module) -> bool:
    """Switch it on for this model; return False if the architecture does not name its layers."""
    layers = layers_of(model)
    for layer in layers:
        if "forward" not in vars(layer):
            # The random state is not preserved, because nothing uses it: the frozen base has no dropout, and an
            # adapter's dropout depends on its key only.
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    return bool(layers)
