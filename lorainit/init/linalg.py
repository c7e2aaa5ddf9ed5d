"""Linear algebra that several methods use: a randomized SVD, and the split of singular triples into factors.

Random numbers are drawn on the CPU from the caller's generator, never from the global one, so that the same seed gives
the same factors on every device.
"""

import math

import torch
from torch import Tensor

from lorainit.config.errors import InitFailed
from lorainit.init.norms import row_norms
from lorainit.model.layers.factors import Factors

# A block has at least this many directions, also for a smaller rank: otherwise the method would converge slowly and
# need many more passes over W.
MIN_BLOCK = 8
# A new direction is dropped if less than this share of it is left after its projection onto the earlier ones was
# subtracted, because so small a rest is mostly float32 rounding.
ROUNDING = 1e-5
# The method ends when one more block adds less than this share of the energy found so far. On the gradients of SmolLM2
# the result then differs from the best rank-16 part by 5e-6 in norm, on its weights by 3e-4 (docs/log.md).
STANDS_STILL = 1e-7


def normal(*shape: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers on the CPU."""
    return torch.randn(*shape, generator=generator, dtype=dtype)


def symmetric(U: Tensor, S: Tensor, Vh: Tensor, *, scale: float) -> Factors:
    """Split singular triples evenly: B = U·sqrt(S/s), A = sqrt(S/s)·Vh, so that s·B·A = U·S·Vh."""
    root = S.sqrt() / math.sqrt(scale)
    return Factors(A=(root[:, None] * Vh).contiguous(), B=(U * root).contiguous())


def count_alive(S: Tensor, *, floor: float) -> int:
    """How many singular values (descending) are above `floor` times the largest. The others are rounding errors."""
    return int((floor * S[:1] < S).sum())


def last_alive(S: Tensor, *, rank: int, floor: float) -> slice | None:
    """The indices of the smallest `rank` singular values that are not numerically zero; None if there are fewer.

    A direction with the singular value zero gives two zero factors, and their gradients are zero too, so it would never
    be trained. Large weights have thousands of directions, and some of them are always numerically zero. So these are
    skipped, and the weight is not refused.

    Args:
        S: singular values, descending.
        floor: values up to this share of the largest one count as zero.
    """
    alive = count_alive(S, floor=floor)
    return slice(alive - rank, alive) if alive >= rank else None


def randomized_svd(W: Tensor, *, rank: int, niter: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triples from a randomized block Krylov space (Musco & Musco, arXiv 1504.05477, alg. 2).

    The space is spanned by Y, (W·Wᵀ)·Y, ... (W·Wᵀ)^niter·Y with Y = W times `rank` random directions. No block is added
    after one that adds nothing to the energy of the leading triples. Subspace iteration is simpler, but it keeps only
    the last block and therefore needs four times as many passes over W for the same accuracy.

    Args:
        W: m×n, with entries of any size. W is first divided by a power of two near its largest entry, because squares
            of very large or small entries leave the range of float32.
        niter: the most blocks after the first; each costs two passes over W.

    Returns:
        U (m×rank), S (rank, descending), Vh (rank×n). The largest entry of each row of Vh is positive, because
        otherwise rounding would choose the signs, and they matter to LoRA-GA, which pairs vectors of different triples.

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
    """X·2^exponent, exact unless the result leaves the range of float32.

    It is multiplied in two halves, because 2^exponent itself may be out of range.
    """
    half = exponent // 2
    return X * 2.0**half * 2.0 ** (exponent - half)


def _leading_triples(W: Tensor, *, rank: int, niter: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """`randomized_svd` of a W whose largest entry is between 1/2 and 1 (or 0)."""
    side = min(W.shape)
    block = min(max(rank, MIN_BLOCK), side)
    # The basis vectors are rows: K (d×m) has orthonormal rows, T = K·W (d×n).
    K = _orthonormal(normal(block, W.shape[1], generator=generator).to(W) @ W.T)
    T = Z = K @ W
    gram = torch.zeros(0, 0, dtype=torch.float64, device=W.device)
    energy = 0.0
    for number in range(niter + 1):
        # Only the lower triangle of T·Tᵀ, because eigh reads no more. In float64, since squares need twice the digits.
        gram = torch.cat([torch.nn.functional.pad(gram, (0, len(Z))), Z.double() @ T.double().T])
        before, energy = energy, float(torch.linalg.eigvalsh(gram)[-rank:].sum())
        if number == niter or len(K) == side or energy - before <= STANDS_STILL * energy:
            break
        Y = _novel((Z @ W.T)[: side - len(K)], K)
        Z = Y @ W
        K, T = torch.cat([K, Y]), torch.cat([T, Z])
    P = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1).to(W)
    # Not T.T @ P / S: where a singular value is only rounding, QR still gives orthonormal directions and this does not.
    Q, R = torch.linalg.qr(T.T @ P)
    signs = Q.gather(0, Q.abs().argmax(0, keepdim=True)).sign()
    S = R.diagonal()
    return K.T @ P * torch.where(S < 0, -signs, signs), S.abs(), (Q * signs).T.contiguous()


def numerical_rank(S: Tensor, W: Tensor) -> int:
    """How many of the leading singular values S of the m×n matrix W are above eps·max(m, n)·S_1, the rounding error."""
    return int((S / S[0] > max(W.shape) * torch.finfo(W.dtype).eps).sum())


def _orthonormal(Y: Tensor) -> Tensor:
    """An orthonormal basis of a space that contains all rows. It is larger than their span if they are dependent."""
    Q: Tensor = torch.linalg.qr(Y.T).Q
    return Q.T


def _novel(Y: Tensor, K: Tensor) -> Tensor:
    """An orthonormal basis of the part of Y's rows outside the span of K's rows (orthonormal). It may be empty.

    QR alone would return directions of rounding error where the rows are dependent, and these may be in the span of K
    (if W has equal rows, all of them are). So the eigenvalues are used first to drop such directions. The projection
    is subtracted a second time, because the division by small eigenvalues enlarges what rounding has left along K.
    """
    Y = Y / row_norms(Y).to(Y).clamp(min=torch.finfo(Y.dtype).tiny)[:, None]
    Y = Y - (Y @ K.T) @ K
    squares, V = torch.linalg.eigh(Y.double() @ Y.double().T)
    kept = squares.gt(ROUNDING**2)
    Y = (V[:, kept] / squares[kept].sqrt()).T.to(Y) @ Y
    return _orthonormal(Y - (Y @ K.T) @ K)
