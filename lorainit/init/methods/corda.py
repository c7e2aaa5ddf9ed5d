"""CorDA: singular directions of W, weighted by the layer's inputs.

Yang et al., "CorDA: Context-Oriented Decomposition Adaptation of LLMs", arXiv 2406.05223, section 3. It differs from
the authors' code on purpose: padding does not count, the damping has a limit, and A and B start with equal norms by
default. In the authors' code the norms depend on the scale of C: c²·C makes B c times larger and A c times smaller.
That scale has no meaning, because the inputs are divided by their largest signed entry. `balance` "authors" keeps it.
The second moments come from `lorainit.init.collectors.moments`.
"""

# ruff: noqa: ARG001 - every method has the same signature, whether it needs all of it or not

import torch
from torch import Tensor

from lorainit.config.errors import InitFailed
from lorainit.config.inits.data import CorDA
from lorainit.init.evidence import Evidence
from lorainit.init.linalg import last_alive, symmetric
from lorainit.init.norms import norm
from lorainit.model.layers.factors import Factors

FIRST_DAMPING, MAX_DAMPING = 0.01, 1.0
INVERSE_ERROR = 0.05
# Directions up to this share of the top singular value count as zero, because they would never be trained. The share is
# smaller than in MiLoRA, since this SVD is in float64.
DEAD = 1e-9


def corda(
    weight: Tensor, evidence: Evidence, *, rank: int, scale: float, config: CorDA, generator: torch.Generator
) -> Factors:
    """With W·C = U·S·Vᵀ and V̂ᵀ = Vᵀ·C⁻¹ (so U·S·V̂ᵀ = W), take the first r triples (ipm) or the last r (kpm).

    The last ones are taken from those that are not numerically zero. A = t·√(S/s)·V̂ᵀ and B = U·√(S/s)/t. With
    `balance` "authors" t = 1, with "equal" t makes ‖A‖ = ‖B‖ (Frobenius). The fact `damping` is the one that was used.

    Raises:
        InitFailed: nothing was collected, or C cannot be inverted, or (kpm) W·C has fewer than r directions.
    """
    if evidence.second_moment is None:
        raise InitFailed("CorDA needs the second moment of the inputs, and none was collected.", param="lora.init")
    # kpm in float64, because C is badly conditioned and the smallest singular values of W·C need more than 7 digits.
    dtype = torch.float64 if config.mode == "kpm" else torch.float32
    C, inverse, damping = damp(evidence.second_moment.to(weight.device, dtype))
    U, S, Vh = torch.linalg.svd(weight.to(dtype) @ C, full_matrices=False)
    part = slice(None, rank) if config.mode == "ipm" else last_alive(S, rank=rank, floor=DEAD)
    if part is None:
        raise InitFailed(
            f"fewer than {rank} singular values of W·C are above {DEAD:g} of the largest, {float(S[0]):.2g}:"
            " the protected directions would leave nothing to learn from.",
            param="lora.init.mode",
        )
    found = symmetric(U[:, part], S[part], Vh[part] @ inverse, scale=scale)
    t = (norm(found.B) / norm(found.A)) ** 0.5 if config.balance == "equal" else 1.0
    return Factors(A=(t * found.A).float(), B=(found.B / t).float(), facts={"damping": damping})


def damp(C: Tensor) -> tuple[Tensor, Tensor, float]:
    """C + δ·mean(diag C)·I, its inverse, and δ: 0.01, doubled until the inverse is accurate.

    Raises:
        InitFailed: no δ up to 1 is enough, or C is zero or not finite.
    """
    identity = torch.eye(len(C), dtype=C.dtype, device=C.device)
    damping = FIRST_DAMPING
    while damping <= MAX_DAMPING:
        candidate = C + damping * C.diagonal().mean() * identity
        inverse, failed = torch.linalg.inv_ex(candidate)
        # A broken inverse is never taken, because a comparison with NaN is false.
        if not failed and torch.linalg.norm(candidate @ inverse - identity) < INVERSE_ERROR:
            return candidate, inverse, damping
        damping *= 2
    raise InitFailed(
        f"the second moment of the inputs cannot be inverted, even with damping {MAX_DAMPING:g}.", param="lora.init"
    )
