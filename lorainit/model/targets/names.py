"""Short names for the layers of a model that cover these layers and no others.

A name is the end of a module's path, cut at a dot, with `*` for a number: `q_proj` covers
`model.layers.0.self_attn.q_proj`.
"""

from collections.abc import Hashable, Mapping, Sequence


def pattern_of(name: str) -> str:
    """`model.layers.0.mlp.up_proj` to `model.layers.*.mlp.up_proj`."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def list_first(names: Sequence[str]) -> str:
    """The first five names for a message, and how many more there are."""
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def short_names(kinds: Mapping[str, Hashable], others: set[str]) -> dict[str, str]:
    """The shortest name for each layer that covers no layer of another kind and no other module.

    If even the longest pattern covers several kinds, the layer keeps its full name.

    Args:
        kinds: the kind of each layer, by full name; layers of different kinds must get different names.
        others: full names of the model's other modules.
    """
    found, open_names, length = dict[str, str](), set(kinds), 1
    while open_names:
        ends = dict[str, set[Hashable]]()
        for name in [*kinds, *others]:
            if end := _end(pattern_of(name), length):
                ends.setdefault(end, set()).add(kinds.get(name, _Other))
        for name in list(open_names):
            end = _end(pattern_of(name), length)
            if end is None or (len(ends[end]) == 1 and not end.startswith("*")):
                found[name] = end or name
                open_names.remove(name)
        length += 1
    return {name: found[name] for name in kinds}


class _Other:
    """The kind of all modules that are not in `kinds`."""


def _end(pattern: str, length: int) -> str | None:
    """The last `length` parts of a pattern; None if it has fewer."""
    parts = pattern.split(".")
    if length > len(parts):
        return None
    return ".".join(parts[-length:])
