"""Losses at an equal budget: after as many steps, tokens or seconds as the cheapest of the compared runs had.

What an initialization spends before training counts: the batches that it was preheated with count as steps, and as
tokens in proportion, and its seconds as seconds. An objective taken at the end of training is the other view, in which
the start is free.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Curve = Sequence[Mapping[str, Any]]  # evaluations: step, tokens, seconds, valid_loss
BUDGETS = {"steps": "step", "tokens": "tokens", "seconds": "seconds"}


def count_start(curve: Curve, *, batches: int, seconds: float) -> list[dict[str, Any]]:
    """A curve whose steps, tokens and seconds include those of the initialization.

    Args:
        batches: of training rows that the initialization was trained with; seconds: that it took.
    """
    known = [point for point in curve if point["valid_loss"] is not None]
    last = known[-1] if known else None
    tokens = batches * last["tokens"] / last["step"] if last and last["step"] else 0
    return [
        {
            **point,
            "step": point["step"] + batches,
            "tokens": point["tokens"] + tokens,
            "seconds": point["seconds"] + seconds,
        }
        for point in known
    ]


def find_limit(curves: Sequence[Curve], *, of: str) -> float | None:
    """The budget that every run had: the least of their ends; None without runs."""
    return min((curve[-1][of] for curve in curves if curve), default=None)


def find_loss(curve: Curve, *, at: float, of: str) -> float | None:
    """The validation loss at a budget, between two evaluations on the line that joins them; None before the first."""
    before: Mapping[str, Any] | None = None
    for point in curve:
        if point[of] >= at:
            if before is None:
                return float(point["valid_loss"]) if point[of] == at else None
            share = (at - before[of]) / (point[of] - before[of])
            return float(before["valid_loss"] + share * (point["valid_loss"] - before["valid_loss"]))
        before = point
    return None
