"""Attention over rows of any lengths by explicit probabilities in float32, forward and backward."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

Rows = tuple[slice, Tensor, Tensor, Tensor]


def _rows(q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Iterator[Rows]:
    """Each row of the batch: its place, and Q, K, V in float32 as heads×tokens×d, keys repeated for grouped heads."""
    groups = q.shape[1] // k.shape[1]
    for start, stop in pairwise(ends.tolist()):
        Q, K, V = (t[start:stop].transpose(0, 1).float() for t in (q, k, v))
        yield slice(start, stop), Q, K.repeat_interleave(groups, 0), V.repeat_interleave(groups, 0)


def _probabilities(Q: Tensor, K: Tensor, scale: float, window: list[int]) -> Tensor:
    place = torch.arange(Q.shape[1])
    distance = place[:, None] - place
    left, right = window
    seen = (distance >= -right if right >= 0 else distance < Q.shape[1]) & (distance <= left if left >= 0 else True)
    return (Q @ K.mT * scale).masked_fill(~seen, -torch.inf).softmax(-1)


def forward(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, *, scale: float, window: list[int]) -> Tensor:
    """tokens×heads×d."""
    found = [(_probabilities(Q, K, scale, window) @ V).transpose(0, 1) for _, Q, K, V in _rows(q, k, v, ends)]
    return torch.cat(found).to(q.dtype)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, *, scale: float, window: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    dq, dk, dv = (torch.zeros(t.shape) for t in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    for here, Q, K, V in _rows(q, k, v, ends):
        dO = grad[here].transpose(0, 1).float()
        P = _probabilities(Q, K, scale, window)
        dP = dO @ V.mT
        dS = P * (dP - (dP * P).sum(-1, keepdim=True)) * scale
        dq[here] = (dS @ K).transpose(0, 1)
        dk[here] = (dS.mT @ Q).unflatten(0, (-1, groups)).sum(1).transpose(0, 1)
        dv[here] = (P.mT @ dO).unflatten(0, (-1, groups)).sum(1).transpose(0, 1)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
