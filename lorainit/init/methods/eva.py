"""EVA: A starts in the principal directions of the layer's inputs.

Paischer et al., "Explained Variance Adaptation", arXiv 2410.07170, section 3. `lorainit.init.collectors.directions`
finds the directions and the rank of each layer; a layer of rank 0 gets no adapter. The scale s is calculated from the
rank that was asked for and is the same in all layers, also with rsLoRA.
"""

# ruff: noqa: ARG001 - every method has the same signature, whether it needs all of it or not

import torch
from torch import Tensor

from lorainit.config.errors import InitFailed
from lorainit.config.inits.data import EVA
from lorainit.init.evidence import Evidence
from lorainit.init.linalg import count_alive
from lorainit.model.layers.factors import Factors

# Directions below this share of the strongest count as zero, because they are rounding errors of a float32 SVD.
DEAD = 1e-6


def eva(
    weight: Tensor, evidence: Evidence, *, rank: int, scale: float, config: EVA, generator: torch.Generator
) -> Factors:
    """A = the first `rank` directions, B = 0; `whiten` divides row i by the square root of S_i.

    Raises:
        InitFailed: nothing was collected, or the inputs have fewer directions than the rank.
    """
    V, S = evidence.directions, evidence.spread
    if V is None or S is None:
        raise InitFailed("EVA needs the directions of the inputs, and none were collected.", param="lora.init")
    alive = alive_directions(S)
    if alive < rank:
        raise InitFailed(
            f"the inputs of the calibration rows vary in {alive} directions, fewer than the rank {rank}: more rows,"
            " or a smaller r.",
            param="lora.init.samples",
        )
    A = V[:rank].to(weight.device)
    if config.whiten:
        A = A / S[:rank, None].to(weight.device).sqrt()
    return Factors(A=A.contiguous(), B=torch.zeros(weight.shape[0], rank, device=weight.device))


def alive_directions(S: Tensor) -> int:
    """How many directions are not numerically zero, by their singular values (largest first)."""
    return count_alive(S, floor=DEAD)
