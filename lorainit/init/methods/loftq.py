"""LoftQ: the best rank-r correction of the error that quantization makes in W.

Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", arXiv 2310.08659, algorithm 1 with
T = 1, because then the base is NF4(W), which anybody can load. Larger T would change the base. Unlike the authors' code
and PEFT we divide the factors by the scale, so that the correction is right for every s. A randomized SVD replaces
their full one, since it is faster.
"""

# ruff: noqa: ARG001 - every method has the same signature, whether it needs all of it or not

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorainit.config.errors import UnsupportedInit
from lorainit.config.inits.quantized import LoftQ
from lorainit.init.evidence import Evidence
from lorainit.init.linalg import randomized_svd, symmetric
from lorainit.init.norms import norm
from lorainit.model.layers.factors import Factors

# Many blocks, because rounding errors have a flat spectrum. On a 2048×2048 matrix of noise at r = 16 this gives
# 99.99 % of the best energy, and 4 blocks give 96 %.
NITER = 16


def loftq(
    weight: Tensor, evidence: Evidence, *, rank: int, scale: float, config: LoftQ, generator: torch.Generator
) -> Factors:
    """s·B·A = SVD_r(W - Q), split evenly; `weight` is Q, the dequantized base, and W comes as evidence.

    Facts: `original_norm` ‖W‖, `quantization_error` ‖W - Q‖/‖W‖, `corrected_error` ‖W - Q - s·B·A‖/‖W‖.

    Raises:
        UnsupportedInit: four bits hold W exactly. Both factors would be zero and stay zero, since their gradients are.
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


def measure_correction(modules: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`quantization_error`: ‖W - Q‖/‖W‖ `before` and ‖W - Q - s·B·A‖/‖W‖ `after`, over all modules."""
    whole = sum(m["original_norm"] ** 2 for m in modules)
    before, after = (
        (sum((m[key] * m["original_norm"]) ** 2 for m in modules) / whole) ** 0.5
        for key in ("quantization_error", "corrected_error")
    )
    return {"quantization_error": {"before": before, "after": after}}
