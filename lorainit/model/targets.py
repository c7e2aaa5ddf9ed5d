"""Which layers of a base model can carry a LoRA, and which of them a run asks for."""

from typing import Any, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from lorainit.errors import RankTooLarge, UnknownTarget, UnsupportedInit
from lorainit.model.experts import ExpertLinear, full_name, short_name
from lorainit.weight import shape_of

Group = Literal["attention", "mlp", "other"]


def linear_layers(model: Any) -> dict[str, nn.Module]:
    """All linear layers by name, in the model's order, without the output embedding.

    Of a mixture each expert's matrix is one (`…experts.down_proj.3`), if `experts.install` has been there.
    """
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | ExpertLinear) and module is not head and not name.endswith("lm_head")
    }


def group_of(name: str) -> Group:
    """Attention, MLP or neither, by the module's path."""
    path = name.lower()
    if "attn" in path or "attention" in path:
        return "attention"
    return "mlp" if any(word in path for word in ("mlp", "feed_forward", "ffn", "expert")) else "other"


def find_targets(model: nn.Module, wanted: str | list[str]) -> dict[str, nn.Module]:
    """The layers a run adapts, by name.

    Args:
        wanted: `all-linear`, `attention`, `mlp`, or suffixes of module names (`q_proj`, `mlp.c_proj`); of experts
            it is the name of their common parameter that counts (`experts.gate_up_proj`).

    Raises:
        UnknownTarget: a suffix matches no module at all.
        UnsupportedInit: it matches something that is not a linear layer.
    """
    layers = linear_layers(model)
    if isinstance(wanted, str):
        found = {n: m for n, m in layers.items() if wanted in ("all-linear", group_of(n))}
        if not found:
            raise _unknown(f"This base model has no {wanted} layers to adapt.")
        return found
    for suffix in wanted:
        if not any(_matches(full_name(n, m), suffix) for n, m in layers.items()):
            raise _refusal(model, suffix, layers)
    return {n: m for n, m in layers.items() if any(_matches(full_name(n, m), suffix) for suffix in wanted)}


def _matches(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def _refusal(model: nn.Module, suffix: str, layers: dict[str, nn.Module]) -> UnsupportedInit | UnknownTarget:
    others = [(n, type(m).__name__) for n, m in model.named_modules() if n not in layers and _matches(n, suffix)]
    if others:
        name, kind = others[0]
        return UnsupportedInit(
            f"target_modules: {name} is of type {kind}; only linear layers other than the output head qualify.",
            param="lora.target_modules",
        )
    known = ", ".join(sorted({short_name(name, module) for name, module in layers.items()}))
    return _unknown(f"target_modules: {suffix!r} matches nothing in this base model, which has {known}.")


def _unknown(message: str) -> UnknownTarget:
    return UnknownTarget(message, param="lora.target_modules")


def check_rank(targets: dict[str, nn.Module], rank: int) -> None:
    """Refuse a rank above the smaller side of any target."""
    for name, module in targets.items():
        out, n = shape_of(module)
        if rank > min(out, n):
            raise RankTooLarge(f"r = {rank} is above the smaller side of {name} ({out}x{n}).", param="lora.r")
