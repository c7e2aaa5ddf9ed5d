"""HRP: A starts in the leading directions of a preheated adapter of a higher rank.

Chen et al., "HRP: High-Rank Preheating for Superior LoRA Initialization", arXiv 2502.07739. **A
reconstruction**: the abstracts and the first lines of the introduction were read; the body of the
paper was not available to us, and no code by the authors is known. From the paper: train a LoRA of
a higher rank for a few steps, take the main singular vectors of its product, start the main LoRA in
those directions. Ours, each an inference or a choice: B = 0 and an untouched base, the *right*
singular vectors for A, orthonormal rows times `c`, a fresh optimizer and the data from the start
for the main run, and everything about the preheat itself (`lorainit.evidence.preheat`).
"""

# ruff: noqa: ARG001 - every method has the same signature, whether it needs all of it or not

import torch
from torch import Tensor

from lorainit.errors import InitFailed
from lorainit.evidence import Evidence
from lorainit.methods._linalg import Factors
from lorainit.spec import HRP

# Below this share of the top singular value a direction of the preheated product is rounding.
DEAD = 1e-7


def hrp(
    weight: Tensor, evidence: Evidence, *, rank: int, scale: float, config: HRP, generator: torch.Generator
) -> Factors:
    """A = c·V_rᵀ with D = B'·A' = U·Σ·Vᵀ, and B = 0.

    Raises:
        InitFailed: there is no preheated adapter, or its product has fewer than r directions.
    """
    if evidence.preheated is None:
        raise InitFailed("HRP needs a preheated adapter, and none was collected.", param="lora.init")
    A, B = (factor.to(weight.device, torch.float64) for factor in evidence.preheated)
    if not (A.isfinite().all() and B.isfinite().all()):
        raise InitFailed("the preheated adapter has non-finite entries.", param="lora.init")
    S, Vh = right_directions(A, B)
    alive = int((DEAD * S[0] < S).sum())
    if alive < rank:
        raise InitFailed(
            f"the preheated product (rank {len(S)}) has {alive} directions (singular values from {float(S[0]):.2g},"
            f" counted above {DEAD:g} of it), fewer than r = {rank}. More preheat_steps, or a smaller r.",
            param="lora.init.preheat_steps",
        )
    facts = {
        "preheat_spectrum": [float(f"{s:.4g}") for s in S[:rank]],
        "preheat_energy": float(S[:rank].square().sum() / S.square().sum()),
    }
    return Factors(
        A=(config.c * Vh[:rank]).float().contiguous(),
        B=torch.zeros(weight.shape[0], rank, device=weight.device),
        facts=facts,
    )


def right_directions(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values (R) and right singular vectors (R×in) of B·A, without the out×in product.

    Args:
        A: R×in.
        B: out×R.
    """
    R_B = torch.linalg.qr(B, mode="r").R
    Q_A, R_A = torch.linalg.qr(A.T)
    _, S, Vh = torch.linalg.svd(R_B @ R_A.T)
    return S, Vh @ Q_A.T
