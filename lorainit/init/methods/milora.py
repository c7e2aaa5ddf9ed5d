"""MiLoRA: the bottom r singular directions of W.

Wang et al., arXiv 2406.09044, section 3. It needs the full SVD, because a randomized one finds only top directions.
"""

# ruff: noqa: ARG001 - every method has the same signature, whether it needs all of it or not

import torch
from torch import Tensor

from lorainit.config.errors import UnsupportedInit
from lorainit.config.inits.weights import MiLoRA
from lorainit.init.evidence import Evidence
from lorainit.init.linalg import last_alive, symmetric
from lorainit.model.layers.factors import Factors

# Singular values up to this share of the top one count as zero. It is above 3e-7, because a float32 SVD returns 1e-7 to
# 3e-7 of the top value where the true one is 0.
DEAD = 1e-6


def milora(
    weight: Tensor, evidence: Evidence, *, rank: int, scale: float, config: MiLoRA, generator: torch.Generator
) -> Factors:
    """As PiSSA, but with the last r of the singular triples that are not numerically zero.

    Raises:
        UnsupportedInit: fewer than r of them are not zero.
    """
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    part = last_alive(S, rank=rank, floor=DEAD)
    if part is None:
        raise UnsupportedInit(
            f"fewer than {rank} singular values are above {DEAD:g} of the largest, {float(S[0]):.2g}:"
            " MiLoRA's other directions would get no gradient.",
            param="lora.init",
        )
    return symmetric(U[:, part], S[part], Vh[part], scale=scale)
