"""y = W·x + s·(B·A - B0·A0)·x around a frozen W, for one adapter or several on rows of their own.

The one autograd function of training. Exact in bf16: the branch is formed first and W·x is added to it
inside the product, which is rounded once. Adding a small s·B·A·x to a W·x that is already rounded
would lose most of it. Knows nothing of models, methods or files.
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

    In float32 every slot's values and gradients come from products of its own shape, so on a CPU they
    are the same bits whoever else is there.
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
        # All that grows with the rows, so that gradient checkpointing can let it go.
        ctx.save_for_backward(*seen, *hidden, *masks)
        # The same memory, but not as a view: some models (Falcon, Gemma 3n) add to a layer's output in place, and
        # autograd refuses that for a view that was made in here.
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
    """Adapters on neighbouring rows whose products have one shape, multiplied at once: n·t rows from `start` on.

    `down` (n×R×in) and `up` (n×out×R): up·down = s·(B·A - B0·A0), in the base's dtype.
    """

    slots: Sequence[Slot]
    down: Tensor
    up: Tensor

    def rows(self, x: Tensor) -> Tensor:
        """Its rows of x, n×t×width, a view."""
        return x[self.slots[0].start : self.slots[-1].stop].view(len(self.slots), -1, x.shape[-1])

    def gradients(self, dA: Tensor, dB: Tensor) -> list[Tensor]:
        """Of every slot's A and B in turn, from those of `down` and of `up` over s."""
        dA, dB = dA.to(self.slots[0].A.dtype), dB.to(self.slots[0].B.dtype)
        found: list[Tensor] = []
        for slot, a, b in zip(self.slots, dA, dB, strict=True):
            r = len(slot.A)
            # Both halves of a subtracted pair end in the same A: s·(B - B0)ᵀ·g + s·B0ᵀ·g.
            found += [a if slot.A0 is None else a[:r] + a[r:], b[:, :r] * slot.scale]
        return found


def _stacks(slots: Sequence[Slot], dtype: torch.dtype) -> list[tuple[_Stack, Tensor | None]]:
    """All slots at once where they are alike, which is faster than several small products; else one by one.

    In float32 always one by one: rounding then is what it is for the adapter alone. With each its masks, n×t×in.
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
    """With a start to subtract as (B - B0)·A + B0·(A - A0), differences taken in float32: B·A and B0·A0
    nearly cancel, and rounding them to bf16 first would leave little of their difference.
    """
    A, B = slot.A, slot.B
    if slot.A0 is not None and slot.B0 is not None:
        A, B = torch.cat([A, A - slot.A0]), torch.cat([B - slot.B0, slot.B0], dim=1)
    return A, slot.scale * B


def _placed(stacks: Sequence[_Stack], parts: Sequence[Tensor], *, rows: int) -> Tensor:
    """Each stack's part (n×t×width) in its own rows, zero elsewhere: rows×width."""
    if len(parts) == 1 and parts[0].shape[:2].numel() == rows:
        return parts[0].flatten(0, 1)
    placed = parts[0].new_zeros(rows, parts[0].shape[-1])
    for stack, part in zip(stacks, parts, strict=True):
        stack.rows(placed).copy_(part)
    return placed


def _times(rows: Tensor, mask: Tensor | None) -> Tensor:
    return rows if mask is None else rows * mask


def _with_bias(x: Tensor, W: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Two factors of x·Wᵀ + bias: the bias joins the sum inside the product too.

    Eight columns more and not one: products of odd widths are slow.
    """
    x, W = F.pad(x, (0, 8)), F.pad(W, (0, 8))
    x[:, -1], W[:, -1] = 1, bias
    return x, W.T
