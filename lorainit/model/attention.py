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
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from transformers import AttentionInterface

from lorainit.batches import Batch, pack
from lorainit.data import Sample

NAME = "lorainit"
BLOCK = 256  # queries of one product on a CPU
# Keys up to which a block keeps its probabilities for the backward pass: forming them again costs another product,
# softmax and two conversions.
KEPT = 512
# Largest relative difference between hidden states that is rounding; rows that see each other differ by about 1.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
_PROBE = (7, 5, 1)  # tokens of the rows with which an architecture is tried


def install(model: Any) -> str | None:
    """Switch `model` to this attention if its hidden states stay what they were.

    Three short rows go through the model one by one as it was loaded, then packed: every part of an
    architecture that mixes positions shows here. Sliding windows, which short rows do not reach, are
    passed to us by transformers and honoured.

    Returns:
        None, or why the model keeps its own attention and cannot train on packed rows.
    """
    if not getattr(model, "_supports_attention_backend", False):
        return "this architecture does not let its attention be chosen"
    device, dtype = next(model.parameters()).device, model.dtype
    rows = _rows(model)
    before, stock = _hidden(model, [pack([row]).ids.to(device) for row in rows]), model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        after = _packed(model, pack(rows).to(device))
    except _Unsupported as error:
        why: str | None = str(error)
    else:
        off = float((after - before).norm() / before.norm())
        why = None if off <= ROUNDING[dtype] else f"packed rows changed its hidden states by {off:.2g}"
    if why:
        model.set_attn_implementation(stock)
    return why


class _Unsupported(Exception):
    """The architecture asks attention for something that we do not do."""


def _rows(model: Any) -> list[Sample]:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = (torch.randint(vocabulary, (n,), generator=generator, dtype=torch.int32) for n in _PROBE)
    return [Sample(line, row, torch.zeros(len(row), dtype=torch.bool)) for line, row in enumerate(ids)]


@torch.no_grad()
def _hidden(model: Any, rows: list[Tensor]) -> Tensor:
    found = [model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0] for ids in rows]
    return torch.cat(found).float()


@torch.no_grad()
def _packed(model: Any, batch: Batch) -> Tensor:
    hidden: Tensor = model.base_model(input_ids=batch.ids, use_cache=False, **batch.layout).last_hidden_state[0]
    return hidden.float()


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
    """transformers' attention function: query (rows, heads, length, d) to (rows, length, heads, d).

    Without `cu_seq_lens_q` every row is one sequence from its first position on: padding on the right
    needs no mask, since no real token looks at it.
    """
    if attention_mask is not None or any(others.get(name) is not None for name in ("softcap", "s_aux", "head_mask")):
        raise _Unsupported("its attention does more than weigh the tokens before")
    if getattr(module, "is_causal", True) is False or query.shape[2] != key.shape[2]:
        raise _Unsupported("its attention is not causal over whole rows")
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

    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    reach = (-1 if window is None else window - 1, 0)
    found = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scale, window_size=reach, enable_gqa=True)
    assert isinstance(found, Tensor)
    return found.view(rows, length, *found.shape[1:])


def _row_by_row(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float, window: int | None) -> Tensor:
    rows, _, length, _ = query.shape
    if window is not None:
        raise _Unsupported("its sliding windows need bf16 on a GPU")
    q, k, v = (t.transpose(0, 1).flatten(1, 2) for t in (query, key, value))
    lengths = ends.diff().tolist()
    parts = zip(*(t.split(lengths, dim=1) for t in (q, k, v)), strict=True)
    found = [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True) for q, k, v in parts]
    return torch.cat(found, dim=1).transpose(0, 1).reshape(rows, length, *q.shape[::2])


# --- on a CPU -----------------------------------------------------------------------------------


class _Rows(torch.autograd.Function):
    """softmax(scale·Q·Kᵀ + causal mask)·V within each row; q (H, T, d), k and v (K, T, d), result (T, H, d).

    One function for all rows: slicing them out under autograd fills a zero gradient of the whole
    batch per row and adds it up (10 % of a step of SmolLM2 with four rows).
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, ends: tuple[int, ...], scale: float, window: int | None
    ) -> Tensor:
        q = q * scale  # smaller than what it is multiplied with
        out = torch.empty(q.shape[1], len(q), q.shape[2], dtype=q.dtype)
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
    return torch.zeros(distance.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)


def _gather(x: Tensor, groups: int) -> Tensor:
    """(H, n, d) to (K, g·n, d): the heads of one key head one below the other."""
    return x.contiguous().view(groups, -1, x.shape[-1])


def _spread(out: Tensor, x: Tensor) -> None:
    """(K, g·n, d) back into (n, H, d)."""
    n, heads, d = out.shape
    out.copy_(x.view(heads, n, d).transpose(0, 1))
