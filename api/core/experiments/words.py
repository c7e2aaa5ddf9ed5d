"""What the results of an experiment mean, in plain sentences, the most important first."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from api.core.experiments.outcome import find_crossing
from api.core.experiments.ranking import Ranking, Row

BASELINE = "kaiming"  # what PEFT does without a choice; compared with it, speed is what people ask about
ALIKE = 0.67, 1.5  # two best rates within this factor are called equal, because grids are coarser


def describe(
    ranking: Ranking,
    *,
    names: Mapping[Any, str],
    curves: Mapping[tuple[Any, float | None, int], Sequence[Mapping[str, Any]]],
    baseline: Any,
) -> list[str]:
    """The sentences of an experiment; none before two treatments can be compared.

    Args:
        names: a name for each treatment.
        curves: the validation curve of each cell, by treatment, learning rate and seed.
        baseline: the treatment that others are compared with for speed.
    """
    rows = [row for row in ranking.rows if row.summary is not None and row.summary.n >= 2]
    if len(rows) < 2:
        return []
    found = [_describe_winner(rows, names)]
    start = next((row for row in rows if row.treatment == baseline), None)
    if start is None:
        return found
    whom = names[start.treatment]
    for row in rows:
        parts = (
            [_describe_rate(row, start, whom), _describe_speed(row, start, curves, whom)] if row is not start else []
        )
        if any(parts):
            found.append(f"{names[row.treatment]} {' and '.join(filter(None, parts))}.")
    return found


def _describe_winner(rows: Sequence[Row], names: Mapping[Any, str]) -> str:
    first, *others = rows
    tied = [row for row in others if row.tied_with_best]
    worse = [row for row in others if not row.tied_with_best]
    best = names[first.treatment]
    if not worse:
        return f"No difference beyond noise between {_list([names[row.treatment] for row in rows])}."
    against = _list([names[row.treatment] for row in worse])
    if not tied:
        return f"{best} is better than {against}, beyond noise."
    along = _list([names[row.treatment] for row in tied])
    verb = "are" if len(tied) > 1 else "is"
    return f"{best} is better than {against}, beyond noise; {along} {verb} not distinguishable from {best}."


def _describe_rate(row: Row, start: Row, whom: str) -> str:
    if not row.learning_rate or not start.learning_rate:
        return ""
    factor = row.learning_rate / start.learning_rate
    if ALIKE[0] < factor < ALIKE[1]:
        return ""
    times = f"{factor:.2g} times" if factor > 1 else f"1/{1 / factor:.2g} of"
    return f"needs {times} {whom}'s learning rate"


def _describe_speed(
    row: Row, start: Row, curves: Mapping[tuple[Any, float | None, int], Sequence[Mapping[str, Any]]], whom: str
) -> str:
    shares = find_shares(row, start, curves, of="step")
    if not shares:
        return ""
    share, seeds = fmean(shares), len(start.values)
    if len(shares) < seeds:
        return f"reaches {whom}'s final loss for {len(shares)} of {seeds} seeds"
    return f"reaches {whom}'s final loss in {share:.0%} of its steps" if share < 1 else ""


def find_shares(
    row: Row, start: Row, curves: Mapping[tuple[Any, float | None, int], Sequence[Mapping[str, Any]]], *, of: str
) -> list[float]:
    """For each common seed that reaches it: the part of the baseline's steps, tokens or seconds to its final loss."""
    found = []
    for seed in sorted(row.values.keys() & start.values.keys()):
        mine = curves.get((row.treatment, row.learning_rate, seed), ())
        other = curves.get((start.treatment, start.learning_rate, seed), ())
        if not mine or not other or not other[-1][of]:
            continue
        at = find_crossing(mine, level=other[-1]["valid_loss"], of=of)
        if at is not None:
            found.append(at / other[-1][of])
    return found


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
