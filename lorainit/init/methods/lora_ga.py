"""LoRA-GA: directions of the gradient, so that the first step is the best rank-2r step.

Wang, Yu, Li, arXiv 2407.05000, NeurIPS 2024, with the authors' scaling. (PEFT's `lora_ga` scales
only B, and by the gradient's singular values.)
"""

from typing import Any

import torch
from torch import Tensor

from lorainit.config.errors import InitFailed, UnsupportedInit
from lorainit.config.inits.data import LoRAGA
from lorainit.init.evidence import Evidence
from lorainit.init.linalg import numerical_rank, randomized_svd
from lorainit.model.layers.factors import Factors

NITER = 16  # the most blocks; the SVD ends earlier when it has converged
ROWS = 512  # of B·A at a time, because the whole product is as large as the weight


def lora_ga(
    weight: Tensor, evidence: Evidence, *, rank: int, scale: float, config: LoRAGA, generator: torch.Generator
) -> Factors:
    """A = c·V[:, a]ᵀ, B = c·U[:, b] for disjoint index sets a, b among the top 2r of g ≈ U·diag(S)·Vᵀ.

    With c = 1 the first gradient step changes W by -eta·s²·P_2r(g). The published c = m^(1/4)/sqrt(gamma), m = out,
    does not depend on the gradient's size. With `norm_clip`, if max|s·B·A| = q·max|W| with q > 1, both factors are
    divided by sqrt(q). Facts: `norm_clip`, which is 1/q, if the layer was clipped; `gradient_rank` if g has fewer than
    2r directions.

    Raises:
        UnsupportedInit: 2r exceeds the smaller side.
        InitFailed: nothing was collected.
    """
    if evidence.gradient is None:
        raise InitFailed("LoRA-GA needs the gradient of the weight, and none was collected.", param="lora.init")
    m, n = weight.shape
    if 2 * rank > min(m, n):
        raise UnsupportedInit(f"LoRA-GA needs 2r <= {min(m, n)} here (r = {rank}).", param="lora.r")
    G = evidence.gradient.to(weight.device)
    U, S, Vh = randomized_svd(G, rank=2 * rank, niter=NITER, generator=generator)
    a, b = _directions(rank, config=config, generator=generator)
    c = _size(weight, rank=rank, scale=scale, config=config, generator=generator)
    A, B = c * Vh[a.to(Vh.device)], c * U[:, b.to(U.device)]
    facts: dict[str, Any] = {}
    if (found := numerical_rank(S, G)) < 2 * rank:
        facts["gradient_rank"] = found
    if config.norm_clip and (share := float(weight.abs().max()) / (scale * _largest_entry(A, B))) < 1:
        A, B = share**0.5 * A, share**0.5 * B
        facts["norm_clip"] = share
    return Factors(A=A, B=B, facts=facts)


def _largest_entry(A: Tensor, B: Tensor) -> float:
    """max|B·A|, `ROWS` rows at a time."""
    return max(float((B[i : i + ROWS] @ A).abs().max()) for i in range(0, len(B), ROWS))


def _directions(r: int, *, config: LoRAGA, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The indices (from 0) of the right singular vectors for A and of the left ones for B."""
    first, second = torch.arange(r), torch.arange(r, 2 * r)
    if config.direction == "ArB2r":
        return first, second
    if config.direction == "A2rBr":
        return second, first
    if config.direction == "ArBr":
        return torch.arange(1, 2 * r, 2), torch.arange(0, 2 * r, 2)
    chosen = torch.randperm(2 * r, generator=generator)
    return chosen[:r], chosen[r:]


def _size(W: Tensor, *, rank: int, scale: float, config: LoRAGA, generator: torch.Generator) -> float:
    """The norm of each row of A and each column of B."""
    if config.scale == "stable":
        return float(W.shape[0] ** 0.25 / config.gamma**0.5)
    if config.scale == "weight_svd":
        S = randomized_svd(W, rank=rank, niter=NITER, generator=generator)[1]
        return float((S / scale).sqrt().mean())
    return 1.0 if config.scale == "unit" else 1.0 / scale
