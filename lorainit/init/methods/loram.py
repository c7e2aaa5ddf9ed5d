"""LoRAM: fixed sine bases, scaled to the magnitude of W. It needs no SVD, no data and, by default, no random numbers.

Zhang et al., "The Primacy of Magnitude in Low-Rank Adaptation", arXiv 2507.06558, section 4. In the paper m is our in
and n is our out, and alpha is our scale s. The authors' code takes the magnitude from the variance of W, which is our
default; the paper's text takes it from the second moment (`magnitude` "second_moment").
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from lorainit.config.errors import UnsupportedInit
from lorainit.config.inits.weights import LoRAM, MiLoRA, OLoRA, PiSSA
from lorainit.init.evidence import Evidence
from lorainit.init.linalg import normal
from lorainit.init.methods.milora import milora
from lorainit.init.methods.olora import olora
from lorainit.init.methods.pissa import pissa
from lorainit.init.norms import norm
from lorainit.model.layers.factors import Factors

F64 = torch.float64


def loram(
    weight: Tensor, evidence: Evidence, *, rank: int, scale: float, config: LoRAM, generator: torch.Generator
) -> Factors:
    """B = beta·P (out×r), A = beta·Sᵀ (r×in), with one beta per layer, calculated from the entries of W.

    Raises:
        UnsupportedInit: r is outside 2..min(out, in), or W has no spread to take a magnitude from.
    """
    m, n = weight.shape
    if not config.min_rank <= rank <= min(m, n):
        bounds = f"{config.min_rank} <= r <= {min(m, n)}"
        raise UnsupportedInit(f"LoRAM needs {bounds} here (got {rank}).", param="lora.r")
    P, S = make_bases(m, n, rank, config=config, generator=generator)
    if config.tracking is None:
        beta = magnitude(weight, P, S, scale=scale, config=config)
    else:
        reference = _reference(weight, evidence, rank=rank, scale=scale, config=config, generator=generator)
        beta = compute_beta(reference, P, S, config=config)
    return Factors(A=(beta * S.T).contiguous().float().to(weight.device), B=(beta * P).float().to(weight.device))


@lru_cache(maxsize=8)
def sine_basis(d: int, r: int) -> Tensor:
    """First r columns of the orthonormal type-I sine transform, lowest frequency first; d×r, float64.

    The last results are cached, because a model has few shapes. So the caller must not change the tensor.
    """
    i = torch.arange(1, d + 1, dtype=F64)
    k = torch.arange(1, r + 1, dtype=F64)
    return math.sqrt(2 / (d + 1)) * torch.sin(i[:, None] * k * (math.pi / (d + 1)))


def rank_factor(m: int, n: int, r: float) -> float:
    """Q = ln r / ln min(m, n): 0 at r = 1, 1 at full rank."""
    return math.log(r) / math.log(min(m, n))


def make_bases(m: int, n: int, r: int, *, config: LoRAM, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """P (m×r) and S (n×r) in float64: the method's sine bases or one of the paper's ablations."""
    if config.basis == "dst":
        return sine_basis(m, r), sine_basis(n, r)
    P = normal(m, r, generator=generator, dtype=F64)
    S = normal(n, r, generator=generator, dtype=F64)
    if config.basis == "random_orthogonal":
        return torch.linalg.qr(P).Q, torch.linalg.qr(S).Q
    return P / math.sqrt(m), S / math.sqrt(n)


def magnitude(weight: Tensor, P: Tensor, S: Tensor, *, scale: float, config: LoRAM) -> float:
    """beta from beta⁴ = Q·var[W]/var[P·Sᵀ], or the same with second moments. Divided by s² if scale-aware."""
    m, n = weight.shape
    squares, variance = moments(weight)
    # Compared with the mean square, because rounding can leave a variance above 0 where all entries are equal.
    if variance <= 1e-14 * squares:
        raise UnsupportedInit("all entries of the weight are equal: there is no magnitude to take.", param="lora.init")
    size = squares if config.magnitude == "second_moment" else variance
    Q = rank_factor(m, n, P.shape[1] / 2 if config.rank_factor == "log_half_r" else P.shape[1])
    beta4 = Q * size / product_size(P, S, config=config)
    return float((beta4 / scale**2 if config.scale_aware else beta4) ** 0.25)


def compute_beta(reference: Factors, P: Tensor, S: Tensor, *, config: LoRAM) -> float:
    """beta from beta⁴ = var[B'·A']/var[P·Sᵀ], with the factors of another method. Neither Q nor the scale is used."""
    B, A = reference.B.cpu().double(), reference.A.T.cpu().double()
    if config.magnitude == "second_moment":
        size = product_norm(B, A) / (B.shape[0] * A.shape[0])
    else:
        size = product_variance(B, A)
    return float((size / product_size(P, S, config=config)) ** 0.25)


def _reference(
    weight: Tensor, evidence: Evidence, *, rank: int, scale: float, config: LoRAM, generator: torch.Generator
) -> Factors:
    if config.tracking == "pissa":
        fast = PiSSA(method="pissa")
        return pissa(weight, evidence, rank=rank, scale=scale, config=fast, generator=generator)
    if config.tracking == "milora":
        bottom = MiLoRA(method="milora")
        return milora(weight, evidence, rank=rank, scale=scale, config=bottom, generator=generator)
    leading = OLoRA(method="olora")
    return olora(weight, evidence, rank=rank, scale=scale, config=leading, generator=generator)


def product_size(P: Tensor, S: Tensor, *, config: LoRAM) -> float:
    """Mean square or variance of the entries of P·Sᵀ, in closed form for the sine bases."""
    m, n, r = P.shape[0], S.shape[0], P.shape[1]
    if config.magnitude == "second_moment":
        return (r if config.basis == "dst" else product_norm(P, S)) / (m * n)
    return sine_variance(m, n, r) if config.basis == "dst" else product_variance(P, S)


def moments(W: Tensor) -> tuple[float, float]:
    """Mean square and unbiased variance of the entries.

    Rows are summed in float32 and their sums in float64, because `W.sum(dtype=float64)` would copy W to float64, which
    is 28 times slower on 4096×11008.
    """
    total = float(W.sum(1).sum(dtype=F64))
    squares = norm(W) ** 2
    return squares / W.numel(), (squares - total * total / W.numel()) / (W.numel() - 1)


def sine_variance(m: int, n: int, r: int) -> float:
    """v = var[P·Sᵀ] of the sine bases in closed form, so that the m×n product is never formed.

    Column k (from 1) of the sine basis sums to a_k(d) = sqrt(2/(d+1))·cot(k·pi/(2(d+1))) for odd k
    and to 0 for even k; with T = sum of a_k(m)·a_k(n), v = (r - T²/(mn))/(mn - 1).
    """
    T = math.fsum(_column_sum(m, k) * _column_sum(n, k) for k in range(1, r + 1, 2))
    return (r - T * T / (m * n)) / (m * n - 1)


def _column_sum(d: int, k: int) -> float:
    return math.sqrt(2 / (d + 1)) / math.tan(k * math.pi / (2 * (d + 1)))


def product_norm(P: Tensor, S: Tensor) -> float:
    """Squared Frobenius norm of P·Sᵀ from the r×r Gram matrices."""
    return float(((P.T @ P) * (S.T @ S)).sum())


def product_variance(P: Tensor, S: Tensor) -> float:
    """Unbiased variance of the entries of P·Sᵀ. The product is never formed."""
    count = P.shape[0] * S.shape[0]
    total = float(P.sum(0) @ S.sum(0))
    return (product_norm(P, S) - total * total / count) / (count - 1)
