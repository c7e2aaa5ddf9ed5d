"""Where an architecture keeps its decoder layers."""

from torch import nn


def listed_layers(model: nn.Module) -> list[nn.Module]:
    """The members of the outermost module lists, because every architecture keeps its decoder layers in such a list."""
    found: list[nn.Module] = []
    for child in model.children():
        found += list(child) if isinstance(child, nn.ModuleList) else listed_layers(child)
    return found
