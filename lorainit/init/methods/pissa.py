"""PiSSA: the top r singular directions of W.

Meng et al., arXiv 2404.02948, section 3. The fast variant (`niter`) is a randomized SVD. The product that is subtracted
from the base is made of the factors that were found, so the adapted model starts as the base even if the SVD is
inexact.
"""

# ruff: noqa: ARG001 - every method has the same signature, whether it needs all of it or not

import torch
from torch import Tensor

from lorainit.config.inits.weights import PiSSA
from lorainit.init.evidence import Evidence
from lorainit.init.linalg import randomized_svd, symmetric
from lorainit.model.layers.factors import Factors


def pissa(
    weight: Tensor, evidence: Evidence, *, rank: int, scale: float, config: PiSSA, generator: torch.Generator
) -> Factors:
    """B = U_r·sqrt(S_r/s), A = sqrt(S_r/s)·V_rᵀ, so that s·B·A is the best rank-r part of W.

    With `niter` a randomized SVD is used that keeps all its blocks (`randomized_svd`). PEFT's keeps only the last one.
    """
    if config.niter is None:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        return symmetric(U[:, :rank], S[:rank], Vh[:rank], scale=scale)
    U, S, Vh = randomized_svd(weight, rank=rank, niter=config.niter, generator=generator)
    return symmetric(U, S, Vh, scale=scale)
