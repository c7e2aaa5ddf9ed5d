"""Gaussian: PEFT's `init_lora_weights="gaussian"`; there is no paper.

The size of A depends on the rank and not on the layer's width as in kaiming, so the best learning rate is another one.
`initialize` warns about it.
"""

# ruff: noqa: ARG001 - every method has the same signature, whether it needs all of it or not

import torch
from torch import Tensor

from lorainit.config.inits.plain import Gaussian
from lorainit.init.evidence import Evidence
from lorainit.init.linalg import normal
from lorainit.model.layers.factors import Factors


def gaussian(
    weight: Tensor, evidence: Evidence, *, rank: int, scale: float, config: Gaussian, generator: torch.Generator
) -> Factors:
    """A ~ N(0, 1/r²), B = 0."""
    out, n = weight.shape
    A = normal(rank, n, generator=generator) / rank
    return Factors(A=A.to(weight.device), B=torch.zeros(out, rank, device=weight.device))
