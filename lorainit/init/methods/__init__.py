"""The initializations: one file per paper. The file and its function have the name of the method.

A method is a pure function on one layer: `(weight, evidence, *, rank, scale, config, generator) ->
Factors(A, B)`. `weight` is out×in in float32 (never changed), A is r×in, B is out×r, both float32
on the weight's device. What a method needs and promises is declared with its parameters in
`lorainit.config.inits`.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from lorainit.config.inits import INITS
from lorainit.init.methods.loftq import measure_correction
from lorainit.model.layers.factors import Factors

METHODS: dict[str, Callable[..., Factors]] = {
    name: getattr(import_module(f"{__name__}.{name}"), name) for name in INITS
}

# Functions from the report entries of all layers to further fields of `job.init_report`, by method.
SUMMARIES: dict[str, Callable[[Sequence[dict[str, Any]]], dict[str, Any]]] = {"loftq": measure_correction}

__all__ = ["METHODS", "SUMMARIES"]
