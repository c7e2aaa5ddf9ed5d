"""The factors every method returns, and the one decomposition several of them share.

Random numbers are drawn on the CPU from the caller's generator, never from the global one, so the
same seed gives the same factors on every device.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """A LoRA pair of one layer in float32: `A` (r×in) and `B` (out×r), and `facts` for the report."""

    A: Tensor
    B: Tensor
    facts: Mapping[str, Any] = field(default_factory=dict)


def normal(*shape: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers on the CPU."""
    return torch.randn(*shape, generator=generator, dtype=dtype)


def symmetric(U: Tensor, S: Tensor, Vh: Tensor, *, scale: float) -> Factors:
    """Split singular triples evenly: B = U·sqrt(S/s), A = sqrt(S/s)·Vh, so that s·B·A = U·S·Vh."""
    root = (S / scale).sqrt()
    return Factors(A=(root[:, None] * Vh).contiguous(), B=(U * root).contiguous())


def randomized_svd(
    W: Tensor, *, rank: int, oversample: int, niter: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triples by subspace iteration (Halko et al., arXiv 0909.4061, alg. 4.4 and 5.1).

    Args:
        W: m×n.
        oversample: extra directions carried along; q = rank + oversample, at most min(m, n).
        niter: power iterations, each with two re-orthonormalizations.

    Returns:
        U (m×rank), S (rank, descending), Vh (rank×n). The largest entry of each row of Vh is positive:
        rounding would choose the signs otherwise, and LoRA-GA pairs vectors of different triples.
    """
    q = min(rank + oversample, *W.shape)
    Q = _orthonormal(W @ normal(W.shape[1], q, generator=generator).to(W))
    for _ in range(niter):
        Q = _orthonormal(W @ _orthonormal(W.T @ Q))
    U, S, Vh = torch.linalg.svd(Q.T @ W, full_matrices=False)
    signs = Vh.gather(1, Vh.abs().argmax(1, keepdim=True)).sign()
    return (Q @ (U * signs.T))[:, :rank], S[:rank], (signs * Vh)[:rank]


def _orthonormal(Y: Tensor) -> Tensor:
    Q: Tensor = torch.linalg.qr(Y).Q
    return Q
