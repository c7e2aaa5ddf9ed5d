"""Incremental principal component analysis of a stream of tokens, and ranks by explained variance.

Paischer et al., arXiv 2410.07170, section 3 (EVA); the update is that of Ross et al. 2008, "Incremental learning for
robust visual tracking", section 3.1.
"""

import math

import torch
from torch import Tensor

from lorainit.init.linalg import randomized_svd
from lorainit.init.norms import norm

NITER = 4


class PCA:
    """Running mean and leading directions of all tokens seen; mean-centred, at most `width` directions.

    Attributes:
        directions: k×in, orthonormal rows, strongest first; k grows to `width` as tokens come.
        S: their singular values, of all tokens minus their mean.
    """

    def __init__(self, width: int, *, generator: torch.Generator) -> None:
        self.width = width
        self.generator = generator
        self.tokens = 0
        self.total = 0.0
        self.mean = torch.zeros(0)
        self.directions = torch.zeros(0, 0)
        self.S = torch.zeros(0)

    def update(self, X: Tensor) -> None:
        """Add a batch, tokens×in. Short batches count too, so that no token is left out.

        The SVD of [S·V; X - mean of X; sqrt(N·M/(N + M))·(old mean - mean of X)] is that of all tokens so far around
        their common mean. It is not exact, because only `width` directions are kept after each batch.
        """
        if not len(X):
            return
        fresh, M, N = X.mean(0), len(X), self.tokens
        centred = X - fresh
        total = norm(centred) ** 2
        rows = [centred]
        if N:
            shift = self.mean - fresh
            weight = N * M / (N + M)
            total += weight * norm(shift) ** 2
            rows = [self.S[:, None] * self.directions, centred, math.sqrt(weight) * shift[None]]
            fresh = self.mean + (fresh - self.mean) * (M / (N + M))
        self.mean, self.tokens, self.total = fresh, N + M, self.total + total
        _, self.S, self.directions = randomized_svd(
            torch.cat(rows), rank=self.width, niter=NITER, generator=self.generator
        )

    @property
    def ratios(self) -> Tensor:
        """Share of the total variance each direction explains, on the CPU."""
        return (self.S.double().square() / max(self.total, torch.finfo(torch.float64).tiny)).cpu()


def has_converged(before: Tensor, after: Tensor, rank: int, tau: float) -> bool:
    """Whether each of the first `rank` directions has cosine >= tau with the span of the first `rank` before.

    PEFT compares each direction with the one at its own place. We do not, because two directions of nearly equal
    variance mix from batch to batch (cosine 0.65 measured on a tiny GPT-2 after 64 batches) while the space that they
    span does not change.
    """
    if min(len(before), len(after)) < rank:
        return False
    cosines = torch.linalg.vector_norm(after[:rank] @ before[:rank].T, dim=1)
    return bool((cosines >= tau).all())


def spread_ranks(ratios: dict[str, Tensor], slots: int) -> dict[str, int]:
    """The rank of each layer: how many of its ratios are among the `slots` largest of all layers, maybe 0.

    Layers that share an input have equal ratios. Of equal ones the earlier direction counts as larger, then that of
    the earlier layer, so that equal ratios always give the same result.
    """
    names = list(ratios)
    bids = [(-float(x), i, layer) for layer, name in enumerate(names) for i, x in enumerate(ratios[name])]
    ranks = dict.fromkeys(names, 0)
    for _, _, layer in sorted(bids)[:slots]:
        ranks[names[layer]] += 1
    return ranks
