"""Position embeddings that depend on the length of a row: which rows may share a pass.

Some rotary embeddings use other frequencies for long rows (longrope), or new ones for every length (dynamic NTK), and
choose them once for all rows of a pass, by the longest row. When the model is served, a row is usually alone. So rows
share a pass here only if each gets the frequencies of its own length.
"""

from typing import Any

from torch import nn

from lorainit.data.batches import Regime, any_length


def regime_of(model: nn.Module) -> Regime:
    """What rows must have in common to share a pass of this model: see `batches.Regime`.

    With longrope they must all be shorter, or all be longer, than the original context length. With dynamic NTK, rows
    above the original length must be equally long. Rows with more tokens than sparse attention chooses get a pass of
    their own, because between tokens of equal score the width of the pass decides.
    """
    alone_above = chosen_tokens(model)
    limits = {limit for module in model.modules() for limit in _limits(module)}
    steps = sorted(limit for limit, dynamic in limits if not dynamic)
    growing = min((limit for limit, dynamic in limits if dynamic), default=None)
    if not limits and not alone_above:
        return any_length

    def regime(tokens: int) -> int | None:
        if alone_above and tokens > alone_above:
            return None
        if growing is not None and tokens > growing:
            return tokens + len(steps)
        return sum(tokens > step for step in steps)

    return regime


def chosen_tokens(model: Any) -> int:
    """How many tokens of a row sparse attention chooses (DeepSeek V3.2, GLM 5); 0 = all."""
    config = getattr(model, "config", None)
    value = getattr(config.get_text_config(), "index_topk", None) if config is not None else None
    return value if isinstance(value, int) else 0


def forget_lengths(model: nn.Module) -> None:
    """Make dynamic NTK choose its frequencies for each pass anew, from now on.

    transformers keeps the frequencies of the longest row so far until a row is shorter than the original length. A
    row's result would therefore depend on the rows before it, and would differ from that of a freshly loaded model.
    """
    for module in model.modules():
        if any("dynamic" in kind for kind in _kinds(module).values()) and hasattr(module, "max_seq_len_cached"):
            module.register_forward_pre_hook(_forget)


def _forget(module: Any, _args: Any) -> None:
    for layer_type, kind in _kinds(module).items():
        prefix = f"{layer_type}_" if layer_type else ""
        if "dynamic" in kind and getattr(module, f"{prefix}max_seq_len_cached", 0) > module.original_max_seq_len:
            original = getattr(module, f"{prefix}original_inv_freq")
            setattr(module, f"{prefix}inv_freq", original.to(getattr(module, f"{prefix}inv_freq").device))
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _kinds(module: Any) -> dict[str, str]:
    """The kinds of frequencies of a rotary embedding, by type of layer; "" = for all layers."""
    kind = getattr(module, "rope_type", None)
    if isinstance(kind, str):
        return {"": kind}
    return {str(name): str(value) for name, value in kind.items()} if isinstance(kind, dict) else {}


def _limits(module: Any) -> list[tuple[int, bool]]:
    """Lengths above which this module uses other frequencies, and whether these then change with every length."""
    found: list[tuple[int, bool]] = []
    for layer_type, kind in _kinds(module).items():
        values: Any = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
        values = values.get(layer_type, {}) if layer_type else values
        if "dynamic" in kind:
            found.append((int(module.original_max_seq_len), True))
        elif kind == "longrope" or "long_mscale" in values:  # the latter: PhiMoE, whatever the kind is called
            found.append((int(values["original_max_position_embeddings"]), False))
    return found
