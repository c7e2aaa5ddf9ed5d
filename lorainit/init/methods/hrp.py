"""HRP: A starts in the leading directions of a preheated adapter of a higher rank.

Chen et al., "HRP: High-Rank Preheating for Superior LoRA Initialization", arXiv 2502.07739. **This is a
reconstruction**: we read the abstracts and the first lines of the introduction. We had no access to the body of the
paper, and know of no code by the authors. From the paper: train a LoRA of a higher rank for a few steps, take the main
singular vectors of its product, and start the main LoRA in these directions. The rest is our inference or choice: B = 0
and an unchanged base, the *right* singular vectors for A, orthonormal rows times `c`, a new optimizer and the data from
the start for the main run, and everything about the preheat itself (`lorainit.init.collectors.preheat`).
"""

# ruff: noqa: ARG001 - every method has the same signature, whether it needs all of it or not

from typing import Any

import torch
from torch import Tensor

from lorainit.config.errors import InitFailed
from lorainit.config.inits.data import HRP
from lorainit.init.evidence import Evidence
from lorainit.init.linalg import count_alive, normal
from lorainit.model.layers.factors import Factors

# Directions of the preheated product below this share of the top singular value count as zero: they are rounding.
DEAD = 1e-7


def hrp(
    weight: Tensor, evidence: Evidence, *, rank: int, scale: float, config: HRP, generator: torch.Generator
) -> Factors:
    """A = c·V_rᵀ with D = B'·A' = U·Σ·Vᵀ, and B = 0; with `side` "left", B = c·U_r and A = 0.

    With `b_init` "carry" B = U_r·Σ_r/c, so that s·B·A is the best rank-r part of the preheated adapter, which was
    trained with the same s. `complete` fills missing directions with random orthonormal ones; the fact `completed` is
    their number.

    Raises:
        InitFailed: there is no preheated adapter, or it is not finite, or its product has fewer than r directions.
    """
    if evidence.preheated is None:
        raise InitFailed("HRP needs a preheated adapter, and none was collected.", param="lora.init")
    A, B = (factor.to(weight.device, torch.float64) for factor in evidence.preheated)
    if not (A.isfinite().all() and B.isfinite().all()):
        raise InitFailed("the preheated adapter has non-finite entries.", param="lora.init")
    S, Vh = _directions(A, B, config)
    alive = _alive(S)
    if alive < rank and config.complete is None:
        raise InitFailed(
            f"the preheated product (rank {len(S)}) has {alive} directions (singular values from {float(S[0]):.2g},"
            f" counted above {DEAD:g} of it), fewer than r = {rank}. More preheat_steps, or a smaller r.",
            param="lora.init.preheat_steps",
        )
    facts: dict[str, Any] = {
        "preheat_spectrum": [float(f"{s:.4g}") for s in S[:rank]],
        "preheat_energy": float(S[:rank].square().sum() / S.square().sum()),
    }
    V = Vh[:rank]
    if alive < rank:
        V = _completed(V[:alive], rank, generator=generator)
        facts["completed"] = rank - alive
    start = (config.c * V).float().contiguous()
    if config.side == "left":
        return Factors(A=torch.zeros(rank, weight.shape[1], device=weight.device), B=start.T.contiguous(), facts=facts)
    # U_r·Σ_r is calculated as D·V_r, so that no left singular vectors are needed.
    carried = B @ (A @ V.T) / config.c if config.b_init == "carry" else torch.zeros_like(B[:, :1]).expand(-1, rank)
    return Factors(A=start, B=carried.float().contiguous(), facts=facts)


def alive_directions(A: Tensor, B: Tensor, config: HRP) -> int:
    """How many directions of the preheated product are not numerically zero."""
    return _alive(_directions(A.double(), B.double(), config)[0])


def _directions(A: Tensor, B: Tensor, config: HRP) -> tuple[Tensor, Tensor]:
    return right_directions(A, B) if config.side == "right" else right_directions(B.T, A.T)


def _alive(S: Tensor) -> int:
    return count_alive(S, floor=DEAD)


def _completed(V: Tensor, rank: int, *, generator: torch.Generator) -> Tensor:
    """`rank` orthonormal rows: those of V (orthonormal), and random ones."""
    more = normal(V.shape[1], rank - len(V), generator=generator, dtype=V.dtype).to(V.device)
    return torch.cat([V, torch.linalg.qr(more - V.T @ (V @ more)).Q.T])


def right_directions(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values (R) and right singular vectors (R×in) of B·A. The out×in product is never formed.

    Args:
        A: R×in.
        B: out×R.
    """
    R_B = torch.linalg.qr(B, mode="r").R
    Q_A, R_A = torch.linalg.qr(A.T)
    _, S, Vh = torch.linalg.svd(R_B @ R_A.T)
    return S, Vh @ Q_A.T
