"""Which group a linear layer belongs to, attention, MLP or neither, decided by the modules that contain it.

Names of the layers are not enough, because OPT's MLP has no module of its own, and Nemotron-H has attention, MLP and
Mamba all under the name `mixer`.
"""

import re
from typing import Any

from torch import nn

from lorainit.config.model_facts import Group

# Checked in this order, because `ShortConvolutionAttention` is attention, and a Mamba mixer may be part of a mixture of
# experts.
_WORDS: tuple[tuple[Group, tuple[str, ...]], ...] = (
    ("attention", ("attn", "attention")),
    ("other", ("mamba", "mixer", "conv", "recurrent", "ssm")),
    ("mlp", ("mlp", "feedforward", "feed_forward", "ffn", "ffw", "expert", "moe")),
)
_HALVES: dict[str, Group] = {"Intermediate": "mlp", "Output": "mlp"}  # BERT's MLP, in two modules
# Names of linear layers that some architectures put directly into the decoder layer (OPT, XGLM).
_ALONE: dict[str, Group] = {"fc1": "mlp", "fc2": "mlp", "fc_in": "mlp", "fc_out": "mlp"}


def group_of(model: nn.Module, name: str) -> Group:
    """The group of the linear layer with this full name: that of the innermost module with a telling class or name."""
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
    """A module's class without the architecture's name, because `GraniteMoe` would look like a mixture; "" for a whole
    decoder layer."""
    kind = type(module).__name__
    if attribute.isdigit() or kind.endswith(("DecoderLayer", "Model")):  # `JambaAttentionDecoderLayer` has an MLP too
        return ""
    return kind.removeprefix(re.split(r"For[A-Z]|LMHead", type(model).__name__)[0])
