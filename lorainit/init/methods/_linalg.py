"""How several methods split singular triples, and the one decomposition that they share.

Random numbers are drawn on the CPU from the caller's generator, never from the global one, so the
same seed gives the same factors on every device.
"""

import math

import torch
from torch import Tensor

from lorainit.config.errors import InitFailed
from lorainit.init.norms import row_norms
from lorainit.model.layers.factors import Factors

# The block never carries fewer directions: alone, the first of them would need many more passes over W.
MIN_BLOCK = 8
# Share of a direction that is rounding once the projection onto all earlier ones is taken off, in float32.
ROUNDING = 1e-5
# The end: one more block added less than this share of the energy found so far. On the gradients of SmolLM2 the
# best rank-16 part is then met within 5e-6 in norm, on its weights within 3e-4 (docs/log.md).
STANDS_STILL = 1e-7


def normal(*shape: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers on the CPU."""
    return torch.randn(*shape, generator=generator, dtype=dtype)


def symmetric(U: Tensor, S: Tensor, Vh: Tensor, *, scale: float) -> Factors:
    """Split singular triples evenly: B = U·sqrt(S/s), A = sqrt(S/s)·Vh, so that s·B·A = U·S·Vh."""
    root = S.sqrt() / math.sqrt(scale)
    return Factors(A=(root[:, None] * Vh).contiguous(), B=(U * root).contiguous())


def count_alive(S: Tensor, *, floor: float) -> int:
    """How many singular values (descending) are more than rounding: above `floor` of the largest."""
    return int((floor * S[:1] < S).sum())


def last_alive(S: Tensor, *, rank: int, floor: float) -> slice | None:
    """Which of the singular values are the smallest `rank` ones that are more than rounding; None: there are fewer.

    A direction whose singular value is zero gives two factors of zeros, which no gradient moves. Among the thousands
    of directions of a large base some are always that near zero, so they are passed over and not a reason to refuse.

    Args:
        S: singular values, descending.
        floor: share of the largest one up to which a value counts as zero.
    """
    alive = count_alive(S, floor=floor)
    return slice(alive - rank, alive) if alive >= rank else None


def randomized_svd(W: Tensor, *, rank: int, niter: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triples from a randomized block Krylov space (Musco & Musco, arXiv 1504.05477, alg. 2).

    The space is spanned by Y, (W·Wᵀ)·Y, ... (W·Wᵀ)^niter·Y with Y = W times `rank` random directions, and ends
    early when one more block adds nothing to the energy of the leading triples. Subspace iteration, which forgets
    all blocks but the last, needs four times as many passes over W for the same product.

    Args:
        W: m×n. Entries of any size: what is decomposed is W over a power of two near its largest entry.
        niter: blocks after the first, at most; each costs two passes over W.

    Returns:
        U (m×rank), S (rank, descending), Vh (rank×n). The largest entry of each row of Vh is positive:
        rounding would choose the signs otherwise, and LoRA-GA pairs vectors of different triples.

    Raises:
        InitFailed: W has non-finite entries.
    """
    largest = float(W.abs().max())
    if not math.isfinite(largest):
        raise InitFailed("a matrix with non-finite entries has no singular directions.", param="lora.init")
    exponent = math.frexp(largest)[1]
    U, S, Vh = _leading_triples(_shifted(W, -exponent), rank=rank, niter=niter, generator=generator)
    return U, _shifted(S, exponent), Vh


def _shifted(X: Tensor, exponent: int) -> Tensor:
    """X·2^exponent, exact but where it leaves the range. In two halves: 2^exponent alone may leave it too."""
    half = exponent // 2
    return X * 2.0**half * 2.0 ** (exponent - half)


def _leading_triples(W: Tensor, *, rank: int, niter: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """`randomized_svd` of a W whose largest entry is between 1/2 and 1 (or 0)."""
    side = min(W.shape)
    block = min(max(rank, MIN_BLOCK), side)
    # Rows, not columns: K (d×m) is orthonormal, T = K·W (d×n).
    K = _orthonormal(normal(block, W.shape[1], generator=generator).to(W) @ W.T)
    T = Z = K @ W
    gram = torch.zeros(0, 0, dtype=torch.float64, device=W.device)
    energy = 0.0
    for number in range(niter + 1):
        # The lower triangle of T·Tᵀ, which is all that is read. Squares need the digits of float64.
        gram = torch.cat([torch.nn.functional.pad(gram, (0, len(Z))), Z.double() @ T.double().T])
        before, energy = energy, float(torch.linalg.eigvalsh(gram)[-rank:].sum())
        if number == niter or len(K) == side or energy - before <= STANDS_STILL * energy:
            break
        Y = _novel((Z @ W.T)[: side - len(K)], K)
        Z = Y @ W
        K, T = torch.cat([K, Y]), torch.cat([T, Z])
    P = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1).to(W)
    # Where S is rounding, only a QR still gives orthonormal directions.
    Q, R = torch.linalg.qr(T.T @ P)
    signs = Q.gather(0, Q.abs().argmax(0, keepdim=True)).sign()
    S = R.diagonal()
    return K.T @ P * torch.where(S < 0, -signs, signs), S.abs(), (Q * signs).T.contiguous()


def numerical_rank(S: Tensor, W: Tensor) -> int:
    """How many of the leading singular values S of the m×n matrix W are more than rounding: above eps·max(m, n)·S_1."""
    return int((S / S[0] > max(W.shape) * torch.finfo(W.dtype).eps).sum())


def _orthonormal(Y: Tensor) -> Tensor:
    """An orthonormal basis of the span of the rows; where they are dependent, of more."""
    Q: Tensor = torch.linalg.qr(Y.T).Q
    return Q.T


def _novel(Y: Tensor, K: Tensor) -> Tensor:
    """An orthonormal basis of what the rows of Y have outside the span of those of K (orthonormal), maybe empty.

    A QR alone would fill up with rounding, and rounding may lie in the span of K: where W has equal rows, all
    of it does. Hence the eigenvalues first; what they leave is well conditioned, but for its rounding along K.
    """
    Y = Y / row_norms(Y).to(Y).clamp(min=torch.finfo(Y.dtype).tiny)[:, None]
    Y = Y - (Y @ K.T) @ K
    squares, V = torch.linalg.eigh(Y.double() @ Y.double().T)
    kept = squares.gt(ROUNDING**2)
    Y = (V[:, kept] / squares[kept].sqrt()).T.to(Y) @ Y
    return _orthonormal(Y - (Y @ K.T) @ K)
