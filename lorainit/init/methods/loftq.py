"""LoftQ: the best rank-r correction of what quantization took from W.

Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", arXiv 2310.08659,
algorithm 1 with T = 1: the base is NF4(W) and nothing else, so it is the one anybody can load. Unlike
the authors' code and PEFT the scale is divided out, so that the correction is right for every s; the
randomized SVD replaces their full one.
"""

# ruff: noqa: ARG001 - every method has the same signature, whether it needs all of it or not

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorainit.config.errors import UnsupportedInit
from lorainit.config.inits.quantized import LoftQ
from lorainit.init.evidence import Evidence
from lorainit.init.methods._linalg import randomized_svd, symmetric
from lorainit.init.norms import norm
from lorainit.model.layers.factors import Factors

# Rounding errors have a flat spectrum, which needs many blocks: 99.99 % of the best energy on a 2048×2048 matrix of
# noise at r = 16, 96 % after 4.
NITER = 16


def loftq(
    weight: Tensor, evidence: Evidence, *, rank: int, scale: float, config: LoftQ, generator: torch.Generator
) -> Factors:
    """s·B·A = SVD_r(W - Q), split evenly; `weight` is Q, the dequantized base, and W comes as evidence.

    The facts: ‖W‖, ‖W - Q‖/‖W‖ and ‖W - Q - s·B·A‖/‖W‖.

    Raises:
        UnsupportedInit: four bits hold W exactly, so both factors would be zero and stay it.
    """
    assert evidence.original is not None
    W = evidence.original.to(weight.device, torch.float32)
    lost = W - weight
    if not lost.any():
        raise UnsupportedInit("four bits lost nothing of this weight: there is nothing to correct.", param="lora.init")
    U, S, Vh = randomized_svd(lost, rank=rank, niter=NITER, generator=generator)
    found = symmetric(U, S, Vh, scale=scale)
    whole, before = norm(W), norm(lost)
    after = norm(lost.addmm_(found.B, found.A, alpha=-scale))
    facts = {"original_norm": whole, "quantization_error": before / whole, "corrected_error": after / whole}
    return Factors(A=found.A, B=found.B, facts=facts)


def correction(modules: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`quantization_error`: ‖W - Q‖/‖W‖ `before` and ‖W - Q - s·B·A‖/‖W‖ `after`, over all modules."""
    whole = sum(m["original_norm"] ** 2 for m in modules)
    before, after = (
        (sum((m[key] * m["original_norm"]) ** 2 for m in modules) / whole) ** 0.5
        for key in ("quantization_error", "corrected_error")
    )
    return {"quantization_error": {"before": before, "after": after}}
