"""Norms of float32 matrices whose entries may have any size that float32 holds.

Squares of entries below 1e-23 are zero and those above 1e19 are infinite, so a plain float32 norm is 0 or infinite
where the matrix is neither. Knows nothing of models or methods.
"""

import torch
from torch import Tensor

# A norm between these was summed from squares that float32 holds.
SMALLEST, LARGEST = 1e-15, 1e18


def row_norms(X: Tensor) -> Tensor:
    """Norms along the last dimension in float64: (..., n) to (...). Rows of extreme size are summed in float64."""
    norms: Tensor = torch.linalg.vector_norm(X, dim=-1).double()
    doubtful = ~((norms > SMALLEST) & (norms < LARGEST))
    if doubtful.any():
        norms[doubtful] = torch.linalg.vector_norm(X[doubtful].double(), dim=-1)
    return norms


def norm(X: Tensor) -> float:
    """The Frobenius norm. By rows first: one float32 sum over millions of squares loses digits."""
    return float(torch.linalg.vector_norm(row_norms(X)))
