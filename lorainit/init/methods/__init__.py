"""The initializations: one paper per file. The function of a method has its name, and so has its file.

A method is a pure function on one layer: `(weight, evidence, *, rank, scale, config, generator) ->
Factors(A, B)`. `weight` is out×in in float32 (never changed), A is r×in, B is out×r, both float32
on the weight's device. What a method needs and promises stands beside its parameters in
`lorainit.config.inits`.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from lorainit.config.inits import INITS
from lorainit.init.methods.loftq import correction
from lorainit.model.layers.factors import Factors

METHODS: dict[str, Callable[..., Factors]] = {
    name: getattr(import_module(f"{__name__}.{name}"), name) for name in INITS
}

# What a method says of all its layers together, beside what each of them says: fields of `job.init_report`.
SUMMARIES: dict[str, Callable[[Sequence[dict[str, Any]]], dict[str, Any]]] = {"loftq": correction}

__all__ = ["METHODS", "SUMMARIES"]
