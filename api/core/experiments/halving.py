"""Successive halving: which cells of an experiment go on at a rung, and which are stopped there.

All cells run to the first rung. There those with the best mean loss over the seeds go on from where they are, and the
others are stopped (Jamieson and Talwalkar, arXiv 1502.07943; a third instead of a half is kept, as in Hyperband). What
the rule assumes (docs/decisions/0074): a cell that is behind two thirds of the others at a rung is not the best one at
the end. A high rate looks bad during the warm-up, so no rung lies in it, and it gains most when the rate decays, so of
two neighbouring rates of one initialization the higher one is kept where the loss is nearly the same.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

RUNGS = (0.1, 0.3, 0.6)  # shares of a run's steps
KEPT = 1 / 3  # of the cells, at each rung
LEAST = 2  # cells that go on, so that the last comparison is one of whole runs
NEARLY = 0.01  # nats; a smaller difference may be noise between seeds, so it does not decide between two rates
MIN_CELLS = 3  # of one seed; fewer are not worth a schedule


@dataclass(frozen=True)
class Standing:
    """Where a cell stands at a rung: the losses of its seeds there; lower is better."""

    treatment: Hashable
    learning_rate: float
    losses: Mapping[int, float]

    @property
    def mean(self) -> float:
        """The mean over seeds; infinite if it has none."""
        return fmean(self.losses.values()) if self.losses else math.inf


def choose_survivors(standings: Sequence[Standing]) -> list[Standing]:
    """The cells that go on, the best first."""
    order = sorted(standings, key=lambda one: (one.mean, -one.learning_rate))
    order = [one for one in order if math.isfinite(one.mean)]
    kept = order[: max(LEAST, math.ceil(len(standings) * KEPT))]
    for one in list(kept):
        higher = _find_next_rate(one, order)
        # It takes the place of the lower rate, so that the number of survivors, and the cost, stay the same.
        if higher is not None and higher not in kept and higher.mean - one.mean <= NEARLY:
            kept[kept.index(one)] = higher
    return kept


def _find_next_rate(one: Standing, order: Sequence[Standing]) -> Standing | None:
    higher = [other for other in order if other.treatment == one.treatment and other.learning_rate > one.learning_rate]
    return min(higher, key=lambda other: other.learning_rate, default=None)


def list_counts(cells: int, *, rungs: Sequence[float] = RUNGS) -> list[int]:
    """How many of `cells` cells are left up to each rung, and after the last one."""
    counts = [cells]
    for _ in rungs:
        counts.append(min(counts[-1], max(LEAST, math.ceil(counts[-1] * KEPT))))
    return counts


def find_cost(cells: int, *, rungs: Sequence[float] = RUNGS) -> float:
    """What `cells` cells cost under this schedule, in whole runs."""
    shares = [after - before for before, after in pairwise((0.0, *rungs, 1.0))]
    return sum(count * share for count, share in zip(list_counts(cells, rungs=rungs), shares, strict=True))
