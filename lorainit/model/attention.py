"""Causal attention inside each row of a packed batch, for stock transformers models.

On a CPU: blocks of queries of all heads that share a key head in one product, so keys and values are
never repeated; probabilities of long rows are formed again in the backward pass, so memory grows with
the length and not with its square. On CUDA: torch's own variable-length flash attention, for bf16. Dropout of
attention probabilities is never active here, since the base runs as it is evaluated.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from transformers import AttentionInterface

NAME = "lorainit"
BLOCK = 256  # queries of one product on a CPU
# Keys up to which a block keeps its probabilities for the backward pass: forming them again costs another product,
# softmax and two conversions.
KEPT = 512


class UnsupportedAttention(Exception):
    """The architecture asks attention for something that is not done here."""


# --- what transformers calls --------------------------------------------------------------------


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query (rows, heads, length, d) to (rows, length, heads, width of a value).

    Values may be narrower or wider than queries and keys, as in latent attention (MLA). Without `cu_seq_lens_q`
    every row is one sequence from its first position on: padding on the right needs no mask, since no real token
    looks at it.

    Raises:
        UnsupportedAttention: it would be something else than weighing the tokens before (`model.layout` then keeps
            the architecture's own attention).
    """
    if attention_mask is not None or any(others.get(name) is not None for name in ("softcap", "s_aux", "head_mask")):
        raise UnsupportedAttention("its attention does more than weigh the tokens before")
    if getattr(module, "is_causal", True) is False or query.shape[2] != key.shape[2]:
        raise UnsupportedAttention("its attention is not causal over whole rows")
    rows, _, length, d = query.shape
    scale = d**-0.5 if scaling is None else scaling
    if query.is_cuda:
        return _on_cuda(query, key, value, cu_seq_lens_q, max_length_q or length, scale, sliding_window), None
    ends = tuple(range(0, rows * length + 1, length)) if cu_seq_lens_q is None else tuple(cu_seq_lens_q.tolist())
    flat = (t.transpose(0, 1).flatten(1, 2) for t in (query, key, value))
    found: Tensor = _Rows.apply(*flat, ends, scale, sliding_window)  # type: ignore[no-untyped-call]
    return found.view(rows, length, *found.shape[1:]), None


AttentionInterface.register(NAME, attend)


def _on_cuda(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor | None, longest: int, scale: float, window: int | None
) -> Tensor:
    rows, _, length, _ = query.shape
    if ends is None:
        ends = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=query.device)
    if query.dtype == torch.float32:  # flash kernels know half precision only
        return _row_by_row(query, key, value, ends, scale, window)
    from torch.nn.attention.varlen import varlen_attn

    # The kernels know one width, a multiple of eight, for queries, keys and values; zeros beyond it change no score.
    width = -(-max(query.shape[-1], value.shape[-1]) // 8) * 8
    q, k, v = (_widened(t.transpose(1, 2).flatten(0, 1), width) for t in (query, key, value))
    reach = (-1 if window is None else window - 1, 0)
    found = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scale, window_size=reach, enable_gqa=True)
    assert isinstance(found, Tensor)
    return found[..., : value.shape[-1]].reshape(rows, length, -1, value.shape[-1])


def _widened(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _row_by_row(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float, window: int | None) -> Tensor:
    rows, _, length, _ = query.shape
    q, k, v = (t.transpose(0, 1).flatten(1, 2) for t in (query, key, value))
    lengths = ends.diff().tolist()
    parts = zip(*(t.split(lengths, dim=1) for t in (q, k, v)), strict=True)
    found = [_causal(q, k, v, scale, window) for q, k, v in parts]
    return torch.cat(found, dim=1).transpose(0, 1).reshape(rows, length, len(query[0]), value.shape[-1])


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    length, seen = q.shape[1], None
    if window is not None and window < length:
        seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - window)
    return F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None, scale=scale, enable_gqa=True)


# --- on a CPU -----------------------------------------------------------------------------------


class _Rows(torch.autograd.Function):
    """softmax(scale·Q·Kᵀ + causal mask)·V within each row; q (H, T, d), k (K, T, d), v (K, T, e), result (T, H, e).

    One function for all rows: slicing them out under autograd fills a zero gradient of the whole
    batch per row and adds it up (10 % of a step of SmolLM2 with four rows).
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, ends: tuple[int, ...], scale: float, window: int | None
    ) -> Tensor:
        q = q * scale  # smaller than what it is multiplied with
        out = torch.empty(q.shape[1], len(q), v.shape[2], dtype=q.dtype)
        kept: list[Tensor] = []
        for first, start, stop in _blocks(ends, window):
            P = _probabilities(_gather(q[:, start:stop], len(k)), k, first, start, stop, window)
            _spread(out[start:stop], P @ v[:, first:stop].contiguous())
            if stop - first <= KEPT:
                kept.append(P)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.ends, ctx.scale, ctx.window = ends, scale, window
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        (grad,) = grads
        found = iter(kept)
        dq = torch.empty(q.shape[1], len(q), q.shape[2], dtype=q.dtype)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for first, start, stop in _blocks(ctx.ends, ctx.window):
            Q, keys = _gather(q[:, start:stop], len(k)), slice(first, stop)
            P = next(found) if stop - first <= KEPT else _probabilities(Q, k, first, start, stop, ctx.window)
            dO = _gather(grad[start:stop].transpose(0, 1), len(k))
            dv[:, keys] += P.transpose(1, 2) @ dO
            dP = dO @ v[:, keys].contiguous().transpose(1, 2)
            dS = torch.ops.aten._softmax_backward_data(dP, P, -1, P.dtype)  # sums in float32 inside
            dk[:, keys] += dS.transpose(1, 2) @ Q
            _spread(dq[start:stop], dS @ k[:, keys].contiguous())
        return dq.mul_(ctx.scale).transpose(0, 1), dk, dv, None, None, None


def _blocks(ends: tuple[int, ...], window: int | None) -> Iterator[tuple[int, int, int]]:
    """(first key, first query, end of both) of every block of every row."""
    for begin, end in pairwise(ends):
        for start in range(begin, end, BLOCK):
            reach = begin if window is None else max(begin, start - window + 1)
            yield reach, start, min(end, start + BLOCK)


def _probabilities(Q: Tensor, k: Tensor, first: int, start: int, stop: int, window: int | None) -> Tensor:
    """P (K, g·queries, keys) of one block in the inputs' dtype.

    Operands of all products are copies of their own: BLAS rounds by how memory is aligned, and where a row
    lies in the batch must not matter.
    """
    S = Q @ k[:, first:stop].contiguous().transpose(1, 2)
    S.unflatten(1, (-1, stop - start)).add_(_mask(stop - start, start - first, window, S.dtype))
    return S.softmax(-1)


@lru_cache(maxsize=64)
def _mask(queries: int, before: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """0 where a query may look, else -inf: queries×(before + queries). Making it anew each time was 4 % of a step."""
    distance = torch.arange(before, before + queries)[:, None] - torch.arange(before + queries)
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    mask = torch.zeros(distance.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
    # A tensor without numbers would be kept, and be what every later pass of this length is masked with.
    assert not isinstance(mask, FakeTensor)
    return mask


def _gather(x: Tensor, groups: int) -> Tensor:
    """(H, n, d) to (K, g·n, d): the heads of one key head one below the other."""
    return x.contiguous().view(groups, -1, x.shape[-1])


def _spread(out: Tensor, x: Tensor) -> None:
    """(K, g·n, d) back into (n, H, d)."""
    n, heads, d = out.shape
    out.copy_(x.view(heads, n, d).transpose(0, 1))
