"""MiLoRA: the bottom r singular directions of W.

Wang et al., arXiv 2406.09044, section 3. Needs the full SVD: a randomized one finds top directions.
"""

# ruff: noqa: ARG001 - every method has the same signature, whether it needs all of it or not

import torch
from torch import Tensor

from lorainit.errors import UnsupportedInit
from lorainit.evidence import Evidence
from lorainit.inits import MiLoRA
from lorainit.methods._linalg import Factors, symmetric

# Below this share of the top singular value both factors are nearly zero and so are their gradients.
# A float32 SVD returns 1e-7 to 3e-7 where the true value is 0, so the line lies above that.
DEAD = 1e-6


def milora(
    weight: Tensor, evidence: Evidence, *, rank: int, scale: float, config: MiLoRA, generator: torch.Generator
) -> Factors:
    """As PiSSA with the last r singular triples.

    Raises:
        UnsupportedInit: the weight is numerically rank deficient, so the directions would be dead.
    """
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    if S[-1] <= DEAD * S[0]:
        raise UnsupportedInit(
            f"the smallest singular value is {float(S[-1]):.2g} against {float(S[0]):.2g} for the largest:"
            " MiLoRA's directions would get no gradient.",
            param="lora.init",
        )
    return symmetric(U[:, -rank:], S[-rank:], Vh[-rank:], scale=scale)
