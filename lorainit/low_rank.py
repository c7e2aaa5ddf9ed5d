"""y = W·x + s·(B·A - B0·A0)·x around a frozen W, for one adapter or several on rows of their own.

The one autograd function of training. Exact in bf16: the sum is formed inside one product,
[x | x·Aᵀ]·[W | s·B]ᵀ, and rounded once. Adding a small s·B·A·x to a W·x that is already rounded
would lose most of it. Knows nothing of models, methods or files.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from lorainit.weight import weight_of


class Slot(NamedTuple):
    """One adapter and its rows: A (r×in), B (out×r), the start that is subtracted or None, and a dropout mask.

    `mask` ((stop - start)×in, or None) holds 0 or 1/(1 - p).
    """

    start: int
    stop: int
    A: Tensor
    B: Tensor
    A0: Tensor | None
    B0: Tensor | None
    scale: float
    mask: Tensor | None


def low_rank(x: Tensor, base: nn.Module, slots: Sequence[Slot]) -> Tensor:
    """Map (..., in) to (..., out) in x's dtype; rows that no slot covers see the base alone.

    Every slot's values and gradients come from products of its own shape, so on a CPU in float32 they
    are the same bits whoever else is there.
    """
    factors = [factor for slot in slots for factor in (slot.A, slot.B)]
    y: Tensor = _LowRank.apply(x.flatten(0, -2), base, slots, *factors)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, base: nn.Module, slots: Sequence[Slot], *_factors: Tensor) -> Tensor:
        pairs = [_down_up(slot, x.dtype) for slot in slots]
        seen = [_dropped(x, slot) for slot in slots]
        hidden = [F.linear(rows, down) for rows, (down, _) in zip(seen, pairs, strict=True)]
        bias = base.bias if isinstance(base.bias, Tensor) else None
        if x.dtype.itemsize > 2:
            y = F.linear(x, weight_of(base), bias)
            for slot, h, (_, up) in zip(slots, hidden, pairs, strict=True):
                y[slot.start : slot.stop].addmm_(h, up.T)
        else:
            # Copying W costs 2 % of a step of SmolLM2 and less where rows are many.
            wide = torch.cat([weight_of(base), *(up for _, up in pairs)], dim=1)
            y = F.linear(torch.cat([x, _placed(slots, hidden, rows=len(x))], dim=1), wide, bias)
        ctx.base, ctx.slots, ctx.pairs = base, slots, pairs
        ctx.save_for_backward(*seen, *hidden)
        return y

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Any, ...]:
        (grad,) = outer
        slots, count = ctx.slots, len(ctx.slots)
        seen, hidden = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        dx = grad @ weight_of(ctx.base) if ctx.needs_input_grad[0] else None
        found: list[Tensor] = []
        for slot, rows, h, (down, up) in zip(slots, seen, hidden, ctx.pairs, strict=True):
            g, r = grad[slot.start : slot.stop], len(slot.A)
            dh = g @ up
            if dx is not None:
                _add(dx[slot.start : slot.stop], dh, down, slot.mask)
            # Both halves of a subtracted pair end in the same A: s·(B - B0)ᵀ·g + s·B0ᵀ·g.
            dA = (dh if slot.A0 is None else dh[:, :r] + dh[:, r:]).T @ rows
            dB = g.T @ h[:, :r]
            found += [dA.to(slot.A.dtype), dB.to(slot.B.dtype).mul_(slot.scale)]
        return dx, None, None, *found


def _down_up(slot: Slot, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Down (R×in) and up (out×R) with up·down = s·(B·A - B0·A0), in the base's dtype.

    With a start to subtract as (B - B0)·A + B0·(A - A0), differences taken in float32: B·A and B0·A0
    nearly cancel, and rounding them to bf16 first would leave little of their difference.
    """
    A, B = slot.A, slot.B
    if slot.A0 is not None and slot.B0 is not None:
        A, B = torch.cat([A, A - slot.A0]), torch.cat([B - slot.B0, slot.B0], dim=1)
    return A.to(dtype), (slot.scale * B).to(dtype)


def _dropped(x: Tensor, slot: Slot) -> Tensor:
    rows = x[slot.start : slot.stop]
    return rows if slot.mask is None else rows * slot.mask


def _placed(slots: Sequence[Slot], hidden: Sequence[Tensor], *, rows: int) -> Tensor:
    """Each slot's hidden values in its own rows and columns, zero elsewhere: rows×(all ranks)."""
    if len(slots) == 1 and len(hidden[0]) == rows:
        return hidden[0]
    placed = hidden[0].new_zeros(rows, sum(h.shape[1] for h in hidden))
    column = 0
    for slot, h in zip(slots, hidden, strict=True):
        placed[slot.start : slot.stop, column : column + h.shape[1]] = h
        column += h.shape[1]
    return placed


def _add(dx: Tensor, dh: Tensor, down: Tensor, mask: Tensor | None) -> None:
    """dx += (dh·down) ⊙ mask, in place."""
    if mask is None:
        dx.addmm_(dh, down)
    else:
        dx.add_((dh @ down).mul_(mask))
