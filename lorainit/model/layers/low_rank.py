"""y = W·x + s·(B·A - B0·A0)·x around a frozen W, for one adapter or several on rows of their own.

The only autograd function of an adapted layer. In bf16 the low-rank branch is computed first, and W·x is added inside
the matrix product, which is rounded once. In the other order a small s·B·A·x would be added to a W·x that is already
rounded, and most of it would be lost.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from lorainit.model.layers.weight import weight_of


class Slot(NamedTuple):
    """One adapter and its rows: A (r×in), B (out×r), the start to subtract (or None), and a dropout mask.

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


def apply_low_rank(x: Tensor, base: nn.Module, slots: Sequence[Slot]) -> Tensor:
    """Map (..., in) to (..., out) in x's dtype; for rows without a slot only the base is used.

    In float32 each slot has matrix products of its own. Therefore, on a CPU, an adapter's values and gradients are the
    same bits whichever other adapters share the pass.
    """
    if not slots:
        untouched: Tensor = base(x)
        return untouched
    factors = [factor for slot in slots for factor in (slot.A, slot.B)]
    y: Tensor = _LowRank.apply(x.flatten(0, -2), base, slots, *factors)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, base: nn.Module, slots: Sequence[Slot], *_factors: Tensor) -> Tensor:
        stacks, masks = zip(*_stacks(slots, x.dtype), strict=True)
        W, bias = weight_of(base), base.bias if isinstance(base.bias, Tensor) else None
        seen = [_times(stack.rows(x), mask) for stack, mask in zip(stacks, masks, strict=True)]
        hidden = [rows @ stack.down.mT for rows, stack in zip(seen, stacks, strict=True)]
        if x.dtype.itemsize > 2:
            y = F.linear(x, W, bias)
            for stack, h in zip(stacks, hidden, strict=True):
                stack.rows(y).baddbmm_(h, stack.up.mT)
        else:
            y = _placed(stacks, [h @ stack.up.mT for h, stack in zip(hidden, stacks, strict=True)], rows=len(x))
            y.addmm_(*((x, W.T) if bias is None else _with_bias(x, W, bias)))
        ctx.base, ctx.stacks = base, stacks
        # Everything that grows with the rows is saved by autograd, so that gradient checkpointing can free it.
        ctx.save_for_backward(*seen, *hidden, *masks)
        # `.data` gives the same memory, but not as a view. Some models (Falcon, Gemma 3n) add to a layer's output in
        # place, and autograd refuses that for a view that was made in a custom function.
        return y.data

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Any, ...]:
        (grad,) = outer
        stacks: tuple[_Stack, ...] = ctx.stacks
        saved, n = ctx.saved_tensors, len(stacks)
        seen, hidden, masks = saved[:n], saved[n : 2 * n], saved[2 * n :]
        inner: list[Tensor] = []
        found: list[Tensor] = []
        for stack, rows, h in zip(stacks, seen, hidden, strict=True):
            g = stack.rows(grad)
            dh = g @ stack.up
            inner.append(dh)
            found += stack.gradients(dA=dh.mT @ rows, dB=(h.mT @ g).mT)
        dx = None
        if ctx.needs_input_grad[0]:
            zipped = zip(stacks, inner, masks, strict=True)
            parts = [_times(dh @ stack.down, mask) for stack, dh, mask in zipped]
            dx = _placed(stacks, parts, rows=len(grad)).addmm_(grad, weight_of(ctx.base))
        return dx, None, None, *found


@dataclass(frozen=True)
class _Stack:
    """n adapters on neighbouring parts of t rows each, whose products have the same shape and are computed together.

    `down` (n×R×in) and `up` (n×out×R): up·down = s·(B·A - B0·A0), in the base's dtype.
    """

    slots: Sequence[Slot]
    down: Tensor
    up: Tensor

    def rows(self, x: Tensor) -> Tensor:
        """The rows of x that belong to this stack, n×t×width, as a view."""
        return x[self.slots[0].start : self.slots[-1].stop].view(len(self.slots), -1, x.shape[-1])

    def gradients(self, dA: Tensor, dB: Tensor) -> list[Tensor]:
        """The gradients of each slot's A and B, in turn, from those of `down` and of `up` before scaling by s."""
        dA, dB = dA.to(self.slots[0].A.dtype), dB.to(self.slots[0].B.dtype)
        found: list[Tensor] = []
        for slot, a, b in zip(self.slots, dA, dB, strict=True):
            r = len(slot.A)
            # In difference form A is in both halves of `down`, so its gradient is the sum: s·(B - B0)ᵀ·g + s·B0ᵀ·g.
            found += [a if slot.A0 is None else a[:r] + a[r:], b[:, :r] * slot.scale]
        return found


def _stacks(slots: Sequence[Slot], dtype: torch.dtype) -> list[tuple[_Stack, Tensor | None]]:
    """Group the slots: all in one stack if their shapes are equal, because that is faster, else one stack for each.

    In float32 always one stack for each, so that rounding is the same as for the adapter alone. Each stack comes with
    its masks (n×t×in) or None.
    """
    alike = {(s.stop - s.start, len(s.A), s.A0 is None, s.mask is None) for s in slots}
    joined = all(one.stop == two.start for one, two in pairwise(slots))
    together = dtype.itemsize == 2 and len(alike) == 1 and joined
    return [_stacked(part, dtype) for part in ([slots] if together else [[slot] for slot in slots])]


def _stacked(slots: Sequence[Slot], dtype: torch.dtype) -> tuple[_Stack, Tensor | None]:
    down, up = zip(*(_down_up(slot) for slot in slots), strict=True)
    masks = [slot.mask for slot in slots if slot.mask is not None]
    stack = _Stack([s._replace(mask=None) for s in slots], torch.stack(down).to(dtype), torch.stack(up).to(dtype))
    return stack, torch.stack(masks) if masks else None


def _down_up(slot: Slot) -> tuple[Tensor, Tensor]:
    """The factors `down` (R×in) and `up` (out×R) of s·(B·A - B0·A0), in float32.

    With a start to subtract, as (B - B0)·A + B0·(A - A0). The differences are computed in float32, because B·A and
    B0·A0 nearly cancel, and rounding them to bf16 before subtracting would leave little of their difference.
    """
    A, B = slot.A, slot.B
    if slot.A0 is not None and slot.B0 is not None:
        A, B = torch.cat([A, A - slot.A0]), torch.cat([B - slot.B0, slot.B0], dim=1)
    return A, slot.scale * B


def _placed(stacks: Sequence[_Stack], parts: Sequence[Tensor], *, rows: int) -> Tensor:
    """A rows×width tensor with each stack's part (n×t×width) in its rows, and zeros elsewhere."""
    if len(parts) == 1 and parts[0].shape[:2].numel() == rows:
        return parts[0].flatten(0, 1)
    placed = parts[0].new_zeros(rows, parts[0].shape[-1])
    for stack, part in zip(stacks, parts, strict=True):
        stack.rows(placed).copy_(part)
    return placed


def _times(rows: Tensor, mask: Tensor | None) -> Tensor:
    return rows if mask is None else rows * mask


def _with_bias(x: Tensor, W: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Two factors of x·Wᵀ + bias, so that the bias too is added inside the product, before rounding.

    They get eight more columns instead of one, because products of odd widths are slow.
    """
    x, W = F.pad(x, (0, 8)), F.pad(W, (0, 8))
    x[:, -1], W[:, -1] = 1, bias
    return x, W.T
