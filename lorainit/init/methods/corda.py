"""CorDA: singular directions of W as its inputs weigh them.

Yang et al., "CorDA: Context-Oriented Decomposition Adaptation of LLMs", arXiv 2406.05223, section
3. Differs from the authors' code on purpose: padding does not count, the damping has an end, and by
default A and B start with equal norms. U, S and C⁻¹ leave the split of a product between its factors
to the size of C, c²·C making B c times larger and A c times smaller, and in the authors' code that
size is an accident: that of the inputs over their largest signed entry. `balance` "authors" keeps it.
The second moments come from `lorainit.init.evidence.moments`.
"""

# ruff: noqa: ARG001 - every method has the same signature, whether it needs all of it or not

import torch
from torch import Tensor

from lorainit.config.errors import InitFailed
from lorainit.config.inits.data import CorDA
from lorainit.init.evidence import Evidence
from lorainit.init.methods._linalg import last_alive, symmetric
from lorainit.init.norms import norm
from lorainit.model.layers.factors import Factors

FIRST_DAMPING, MAX_DAMPING = 0.01, 1.0
INVERSE_ERROR = 0.05
# As in MiLoRA: up to this share of the top singular value both factors are dead. Float64, hence small.
DEAD = 1e-9


def corda(
    weight: Tensor, evidence: Evidence, *, rank: int, scale: float, config: CorDA, generator: torch.Generator
) -> Factors:
    """From W·C = U·S·Vᵀ and V̂ᵀ = Vᵀ·C⁻¹, so U·S·V̂ᵀ = W: the first r triples (ipm) or the last (kpm)
    that are not numerically zero.

    A = t·√(S/s)·V̂ᵀ and B = U·√(S/s)/t: with `balance` "authors" t = 1, with "equal" t makes ‖A‖ = ‖B‖ (Frobenius).

    Raises:
        InitFailed: nothing was collected, or C cannot be inverted.
        InitFailed: kpm on a weight that has fewer than r directions under its inputs.
    """
    if evidence.second_moment is None:
        raise InitFailed("CorDA needs the second moment of the inputs, and none was collected.", param="lora.init")
    # The last directions of a product whose condition number is that of C need more than 7 digits.
    dtype = torch.float64 if config.mode == "kpm" else torch.float32
    C, inverse, damping = damped(evidence.second_moment.to(weight.device, dtype))
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


def damped(C: Tensor) -> tuple[Tensor, Tensor, float]:
    """C + δ·mean(diag C)·I, its inverse, and the δ from 0.01 on, doubled until the inverse is one.

    Raises:
        InitFailed: no δ up to 1 is enough, or C is zero or not finite.
    """
    identity = torch.eye(len(C), dtype=C.dtype, device=C.device)
    damping = FIRST_DAMPING
    while damping <= MAX_DAMPING:
        candidate = C + damping * C.diagonal().mean() * identity
        inverse, failed = torch.linalg.inv_ex(candidate)
        # NaN compares false, so a broken inverse is never taken.
        if not failed and torch.linalg.norm(candidate @ inverse - identity) < INVERSE_ERROR:
            return candidate, inverse, damping
        damping *= 2
    raise InitFailed(
        f"the second moment of the inputs cannot be inverted, even with damping {MAX_DAMPING:g}.", param="lora.init"
    )
