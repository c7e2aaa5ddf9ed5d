"""Attention, MLP or neither: what part of a layer a linear map belongs to, told by the modules around it.

Names alone do not tell: OPT's MLP has no module of its own, and Nemotron-H calls attention, MLP and Mamba `mixer`.
"""

import re
from typing import Any

from torch import nn

from lorainit.config.model_facts import Group

# In this order, since `ShortConvolutionAttention` is attention, and a mixer of Mamba may lie in a mixture of experts.
_WORDS: tuple[tuple[Group, tuple[str, ...]], ...] = (
    ("attention", ("attn", "attention")),
    ("other", ("mamba", "mixer", "conv", "recurrent", "ssm")),
    ("mlp", ("mlp", "feedforward", "feed_forward", "ffn", "ffw", "expert", "moe")),
)
_HALVES: dict[str, Group] = {"Intermediate": "mlp", "Output": "mlp"}  # BERT's MLP, in two modules
# Of layers that keep their linear maps without a module around them (OPT, XGLM).
_ALONE: dict[str, Group] = {"fc1": "mlp", "fc2": "mlp", "fc_in": "mlp", "fc_out": "mlp"}


def group_of(model: nn.Module, name: str) -> Group:
    """The group of the linear layer of this full name: by the innermost module around it whose class or name tells."""
    path = name.split(".")
    for depth in range(len(path) - 1, 0, -1):
        module = model.get_submodule(".".join(path[:depth]))
        kind = _kind(model, module, path[depth - 1])
        if found := _HALVES.get(kind) or _told_by(kind) or _told_by(path[depth - 1]):
            return found
    return _ALONE.get(path[-1], "other")


def _told_by(word: str) -> Group | None:
    lower = word.lower()
    return next((group for group, words in _WORDS if any(part in lower for part in words)), None)


def _kind(model: nn.Module, module: Any, attribute: str) -> str:
    """A module's class without the architecture's name (`GraniteMoe`), and nothing for a whole layer."""
    kind = type(module).__name__
    if attribute.isdigit() or kind.endswith(("DecoderLayer", "Model")):  # `JambaAttentionDecoderLayer` has an MLP too
        return ""
    return kind.removeprefix(re.split(r"For[A-Z]|LMHead", type(model).__name__)[0])
