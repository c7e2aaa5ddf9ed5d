"""Orthogonal: both factors start non-zero and their product is zero.

Blog "Rethink LoRA initialisation" (datta0.github.io); PEFT's `init_lora_weights="orthogonal"`.
Both factors have rank r/2 only.
"""

# ruff: noqa: ARG001 - every method has the same signature, whether it needs all of it or not

import torch
from torch import Tensor

from lorainit.config.inits.plain import Orthogonal
from lorainit.init.evidence import Evidence
from lorainit.init.linalg import normal
from lorainit.model.layers.factors import Factors


def orthogonal(
    weight: Tensor, evidence: Evidence, *, rank: int, scale: float, config: Orthogonal, generator: torch.Generator
) -> Factors:
    """A = (Z1·q1)ᵀ/divisor, B = (Z2·q2)/divisor with q1, q2 the even and odd rows of one orthogonal r×r matrix.

    B·A = Z2·q2·q1ᵀ·Z1ᵀ/divisor² = 0 because q2·q1ᵀ = 0. It is computed in float64, so that only the rounding of the
    stored float32 factors keeps the product from being exactly zero.
    """
    out, n = weight.shape
    Q = torch.linalg.qr(normal(rank, rank, generator=generator, dtype=torch.float64)).Q
    Z1 = normal(n, rank // 2, generator=generator, dtype=torch.float64)
    Z2 = normal(out, rank // 2, generator=generator, dtype=torch.float64)
    A, B = (Z1 @ Q[0::2]).T / config.divisor, Z2 @ Q[1::2] / config.divisor
    return Factors(A=A.contiguous().float().to(weight.device), B=B.float().to(weight.device))
