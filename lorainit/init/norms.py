"""Norms of float32 matrices with very small or very large entries.

In float32 the squares of entries below 1e-23 are zero and those of entries above 1e19 are infinite. So a plain float32
norm may be 0 or infinite although the matrix is neither.
"""

import torch
from torch import Tensor

# A float32 norm between these is right, because float32 can hold the squares that it was summed from.
SMALLEST, LARGEST = 1e-15, 1e18


def row_norms(X: Tensor) -> Tensor:
    """Norms along the last dimension in float64: (..., n) to (...). Rows of extreme size are summed in float64."""
    norms: Tensor = torch.linalg.vector_norm(X, dim=-1).double()
    doubtful = ~((norms > SMALLEST) & (norms < LARGEST))
    if doubtful.any():
        norms[doubtful] = torch.linalg.vector_norm(X[doubtful].double(), dim=-1)
    return norms


def norm(X: Tensor) -> float:
    """The Frobenius norm. Rows are summed first, because one float32 sum over millions of squares is inexact."""
    return float(torch.linalg.vector_norm(row_norms(X)))
