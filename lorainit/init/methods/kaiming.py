"""Kaiming: the default initialization of LoRA and of PEFT.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
"""

# ruff: noqa: ARG001 - every method has the same signature, whether it needs all of it or not

import torch
from torch import Tensor

from lorainit.config.inits.plain import Kaiming
from lorainit.init.evidence import Evidence
from lorainit.model.layers.factors import Factors


def kaiming(
    weight: Tensor, evidence: Evidence, *, rank: int, scale: float, config: Kaiming, generator: torch.Generator
) -> Factors:
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0: kaiming_uniform with a = sqrt(5) over the fan-in."""
    out, n = weight.shape
    bound = n**-0.5
    A = (torch.rand(rank, n, generator=generator) * 2 - 1) * bound
    return Factors(A=A.to(weight.device), B=torch.zeros(out, rank, device=weight.device))
