"""LoRA-One: the adapter starts as one step along the full gradient, in the gradient's leading directions.

Zhang, Liu, Chen, arXiv 2502.01235, ICML 2025. "v3" is Algorithm 1 of the camera-ready version: the base is unchanged,
so the adapted model starts away from the base on purpose. "v1" is the paper's first version: orthonormal directions,
and the start is subtracted, so that the adapted model starts as the base.
"""

# ruff: noqa: ARG001 - every method has the same signature, whether it needs all of it or not

import torch
from torch import Tensor

from lorainit.config.errors import InitFailed
from lorainit.config.inits.data import LoRAOne
from lorainit.init.evidence import Evidence
from lorainit.init.linalg import numerical_rank, randomized_svd
from lorainit.model.layers.factors import Factors

GAMMA = {"v3": 128.0, "v1": 64.0}  # the authors' commands


def lora_one(
    weight: Tensor, evidence: Evidence, *, rank: int, scale: float, config: LoRAOne, generator: torch.Generator
) -> Factors:
    """Factors from g ≈ U·diag(S)·Vᵀ, the mean gradient (out×in).

    v3: B = -U_r·sqrt(S/(S_1·gamma)), A = sqrt(S/(S_1·gamma))·V_rᵀ, so that s·B·A is -s/(gamma·S_1) times
    the best rank-r part of g: a gradient step whose operator norm is s/gamma in every layer.
    v1: B = U_r·m^(1/4)/sqrt(gamma), A = V_rᵀ·m^(1/4)/sqrt(gamma), m = out.
    The fact `gradient_rank` is the number of directions of g, if there are fewer than r.

    Raises:
        InitFailed: nothing was collected.
    """
    if evidence.gradient is None:
        raise InitFailed("LoRA-One needs the gradient of the weight, and none was collected.", param="lora.init")
    G = evidence.gradient.to(weight.device)
    if config.niter is None:
        U, S, Vh = torch.linalg.svd(G, full_matrices=False)
        U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    else:
        U, S, Vh = randomized_svd(G, rank=rank, niter=config.niter, generator=generator)
    gamma, found = gamma_of(config, evidence), numerical_rank(S, G)
    facts = {"gradient_rank": found} if found < rank else {}
    if config.version == "v1":
        size = G.shape[0] ** 0.25 / gamma**0.5
        return Factors(A=size * Vh, B=size * U, facts=facts)
    root = (S / S[0] / gamma).sqrt()
    return Factors(A=(root[:, None] * Vh).contiguous(), B=-(U * root), facts=facts)


def gamma_of(config: LoRAOne, evidence: Evidence) -> float:
    """The caller's number, the published one, or what the line search found."""
    if config.gamma == "auto":
        assert evidence.step is not None
        return evidence.step.gamma
    return GAMMA[config.version] if config.gamma is None else config.gamma
