"""Causal attention inside each row of a packed batch, for stock transformers models.

On a CPU, blocks of queries of all heads that share a key head are multiplied in one product, so that keys and values
are never repeated. Probabilities of long rows are computed again in the backward pass, so that memory grows with the
length and not with its square. On CUDA, torch's own kernels for rows of any lengths are used: flash attention and, for
float32 and wide heads, memory-efficient attention. There is no dropout of attention probabilities, because the base
runs in evaluation mode.
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
# Up to so many keys, a block keeps its probabilities for the backward pass, because computing them again costs another
# product, a softmax and two conversions.
KEPT = 512
# transformers' names for what some architectures need beyond plain attention: caps, sinks, biases, and the tokens or
# blocks that sparse attention chooses. The latter must be refused by name: in short rows everything is chosen, so a
# trial on short rows would not show the difference.
OTHER_THINGS = ("softcap", "s_aux", "sinks", "head_mask", "position_bias", "indices", "block_indices")
CAUSAL = 1  # a token sees itself and those before: torch's number for `CausalFromTopLeft` (`sdp_utils_cpp.h`)


class UnsupportedAttention(Exception):
    """The architecture needs something that this attention does not do."""


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
    every row is one sequence that starts at its first position. Padding on the right needs no mask, because with
    causal attention no real token sees it.

    Raises:
        UnsupportedAttention: the architecture needs more than plain causal attention (`model.layout` then keeps the
            architecture's own).
    """
    if attention_mask is not None or any(others.get(name) is not None for name in OTHER_THINGS):
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


# --- on CUDA --------------------------------------------------------------------------------------
#
# What the kernels take is checked in torch's aten/src/ATen/native/transformers/cuda. Flash (flash_api.cpp): half
# precision; one width for queries, keys and values, a multiple of 8 up to 256, and for training on some GPUs not from
# 193 to 224 (sdp_utils.cpp). Memory-efficient (attention.cu, attention_backward.cu): float32 too; widths of any size in
# multiples of 16 bytes; as many key heads as heads. Both: rows' ends as int32 on the device; both repeat bit by bit
# where deterministic algorithms are asked for. `model.layout` tries them, because they may refuse more than that.

HALVES = (torch.bfloat16, torch.float16)
FLASH_WIDTH, FLASH_TRAINED = 256, 192


def _on_cuda(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor | None, longest: int, scale: float, window: int | None
) -> Tensor:
    if query.dtype not in (*HALVES, torch.float32):
        raise UnsupportedAttention(f"no kernel keeps attention inside of packed rows in {query.dtype}")
    rows, _, length, _ = query.shape
    if ends is None:
        ends = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=query.device)
    width = -(-max(query.shape[-1], value.shape[-1]) // 8) * 8
    flash = query.dtype in HALVES and width <= FLASH_WIDTH
    width = FLASH_WIDTH if flash and width > FLASH_TRAINED else width
    # Zeros beyond a head's own width change no score.
    q, k, v = (_widened(t.transpose(1, 2).flatten(0, 1), width) for t in (query, key, value))
    found = (_flash if flash else _efficient)(q, k, v, ends, longest, scale, window)
    return found[..., : value.shape[-1]].reshape(rows, length, -1, value.shape[-1])


def _widened(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _flash(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, scale: float, window: int | None) -> Tensor:
    """tokens×heads×width; so for `_efficient`."""
    from torch.nn.attention.varlen import varlen_attn

    reach = (-1 if window is None else window - 1, 0)
    found = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scale, window_size=reach, enable_gqa=True)
    assert isinstance(found, Tensor)
    return found


def _efficient(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, scale: float, window: int | None) -> Tensor:
    k, v = (t[:, :, None].expand(-1, -1, q.shape[1] // k.shape[1], -1).flatten(1, 2) for t in (k, v))
    found: Tensor = _Efficient.apply(q[None], k[None], v[None], ends, longest, scale, window)  # type: ignore[no-untyped-call]
    return found[0]


class _Efficient(torch.autograd.Function):
    """One kernel for all rows, for 1×tokens×heads×width.

    It has a backward pass here because torch's own ignores the sliding window (torch 2.13).
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, scale: float, window: int | None
    ) -> Tensor:
        found: tuple[Tensor, ...] = torch.ops.aten._efficient_attention_forward(
            q, k, v, None, ends, ends, longest, longest, 0.0, CAUSAL, any(ctx.needs_input_grad),
            scale=scale, window_size=window,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, ends, *found[:4])
        ctx.longest, ctx.scale, ctx.window = longest, scale, window
        return found[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, ends, out, lse, seed, offset = ctx.saved_tensors
        found = torch.ops.aten._efficient_attention_backward(
            grads[0], q, k, v, None, out, ends, ends, ctx.longest, ctx.longest, lse, 0.0, seed, offset, CAUSAL, False,
            scale=ctx.scale, window_size=ctx.window,
        )  # fmt: skip
        return *found[:3], None, None, None, None


# --- on a CPU -----------------------------------------------------------------------------------


class _Rows(torch.autograd.Function):
    """softmax(scale·Q·Kᵀ + causal mask)·V within each row; q (H, T, d), k (K, T, d), v (K, T, e), result (T, H, e).

    One autograd function for all rows, because slicing each row under autograd makes a gradient of the whole batch's
    size for every row and adds these up (10 % of a step of SmolLM2 with four rows).
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, ends: tuple[int, ...], scale: float, window: int | None
    ) -> Tensor:
        q = q * scale  # scale the queries, because they are smaller than the matrix of scores
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

    All operands are copied first, because BLAS rounds differently depending on alignment, and a row's result must not
    depend on its position in the batch.
    """
    S = Q @ k[:, first:stop].contiguous().transpose(1, 2)
    S.unflatten(1, (-1, stop - start)).add_(_mask(stop - start, start - first, window, S.dtype))
    return S.softmax(-1)


@lru_cache(maxsize=64)
def _mask(queries: int, before: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """0 where a query may look, else -inf: queries×(before + queries). Cached, because making it took 4 % of a step."""
    distance = torch.arange(before, before + queries)[:, None] - torch.arange(before + queries)
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    mask = torch.zeros(distance.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
    # A fake tensor must not get into the cache, because later passes of this length would be masked with it.
    assert not isinstance(mask, FakeTensor)
    return mask


def _gather(x: Tensor, groups: int) -> Tensor:
    """(H, n, d) to (K, g·n, d): the query heads of one key head are stacked."""
    return x.contiguous().view(groups, -1, x.shape[-1])


def _spread(out: Tensor, x: Tensor) -> None:
    """(K, g·n, d) back into (n, H, d)."""
    n, heads, d = out.shape
    out.copy_(x.view(heads, n, d).transpose(0, 1))
