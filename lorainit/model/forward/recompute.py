"""Gradient checkpointing: keep what enters each decoder layer and run the layer again in the backward pass.

Costs a third forward pass and saves the memory of all layers but one; values and gradients stay the
same bits. Not by transformers' own switch: that acts on models in training mode only, which would
wake the dropout of the base.
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
    """Switch it on for as long as the model lives; False where the architecture names no layers."""
    layers = layers_of(model)
    for layer in layers:
        if "forward" not in vars(layer):
            # The frozen base draws nothing, and an adapter's dropout is a function of its key.
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    return bool(layers)
