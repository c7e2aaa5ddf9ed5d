"""The initializations: one paper per file, and the table of them, by hand.

A method is a pure function on one layer: `(weight, evidence, *, rank, scale, config, generator) ->
Factors(A, B)`. `weight` is out×in in float32 (never changed), A is r×in, B is out×r, both float32
on the weight's device. What a method needs and promises stands beside its parameters in
`lorainit.config.inits`.
"""

from collections.abc import Callable, Sequence
from typing import Any

from lorainit.init.methods.corda import corda
from lorainit.init.methods.eva import eva
from lorainit.init.methods.gaussian import gaussian
from lorainit.init.methods.hrp import hrp
from lorainit.init.methods.kaiming import kaiming
from lorainit.init.methods.loftq import correction, loftq
from lorainit.init.methods.lora_ga import lora_ga
from lorainit.init.methods.lora_one import lora_one
from lorainit.init.methods.loram import loram
from lorainit.init.methods.milora import milora
from lorainit.init.methods.olora import olora
from lorainit.init.methods.orthogonal import orthogonal
from lorainit.init.methods.pissa import pissa
from lorainit.model.layers.factors import Factors

METHODS: dict[str, Callable[..., Factors]] = {
    "kaiming": kaiming,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    "pissa": pissa,
    "milora": milora,
    "olora": olora,
    "loram": loram,
    "hrp": hrp,
    "eva": eva,
    "corda": corda,
    "lora_ga": lora_ga,
    "lora_one": lora_one,
    "loftq": loftq,
}

# What a method says of all its layers together, beside what each of them says: fields of `job.init_report`.
SUMMARIES: dict[str, Callable[[Sequence[dict[str, Any]]], dict[str, Any]]] = {"loftq": correction}

__all__ = ["METHODS", "SUMMARIES"]
