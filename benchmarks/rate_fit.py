"""Which measurement before the first step predicts the best learning rate? Fits and judgements. Loads no torch.

A form predicts rate = c·f, where f is a number that was measured before the first step. Its one constant c is the mean
of best rate over f (in logarithms) over the pairs it is fitted to. It is judged on others: each method is predicted
from the other methods, and each data set from the other data sets.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from benchmarks.rate_records import KEPT_GAIN, PER_DECADE, RATES, Cell, Measures

LOSS_ALLOWED = 1.05  # of the best rate's loss


@dataclass(frozen=True)
class Pair:
    """A method on a data set with one seed: its sweep, and what was measured before its first step."""

    cell: Cell
    measures: Measures

    @property
    def best_rate(self) -> float:
        """The vertex of the parabola through the best swept rate and its neighbours, over the logarithm of the rate."""
        points = self.cell.points
        best = max(range(len(points)), key=lambda i: self.cell.gain(points[i]))
        three = points[max(0, best - 1) : best + 2]
        return vertex([point.rate for point in three], [self.cell.gain(point) for point in three])

    @property
    def best_gain(self) -> float:
        """The largest fall of the held-out loss at a swept rate."""
        return max(map(self.cell.gain, self.cell.points))

    def gain_at(self, rate: float) -> float | None:
        """The fall of the held-out loss at a rate, on straight lines over the logarithm of the rate.

        Up to half a step beyond the outermost rates it is theirs. None further out, and beside a rate that diverged.
        """
        points = self.cell.points
        half = 10 ** (0.5 / PER_DECADE)
        if points[0].rate / half <= rate <= points[-1].rate * half:
            rate = min(max(rate, points[0].rate), points[-1].rate)
        for left, right in pairwise(points):
            if left.rate <= rate <= right.rate and left.end is not None and right.end is not None:
                way = math.log(rate / left.rate) / math.log(right.rate / left.rate)
                return (1 - way) * self.cell.gain(left) + way * self.cell.gain(right)
        return None


def vertex(rates: Sequence[float], gains: Sequence[float]) -> float:
    """The rate with the largest gain of a parabola through three points over the logarithm of the rate, which are
    equally far apart; the best of the points if there are fewer or they do not bend down."""
    best = max(range(len(gains)), key=lambda i: gains[i])
    if len(rates) < 3 or best != 1 or not all(map(math.isfinite, gains)):
        return rates[best]
    bend = gains[0] - 2 * gains[1] + gains[2]
    shift = 0.5 * (gains[0] - gains[2]) / bend
    return rates[1] * (rates[2] / rates[1]) ** shift


# --- forms ---------------------------------------------------------------------------------------

Feature = Callable[[Pair], float | None]


def _positive(value: float) -> float | None:
    return value if value > 0 else None


def best_single_update(pair: Pair) -> float | None:
    """The rate at which one update lowers the loss on its own rows most, as computed at `RATES`."""
    losses = pair.measures.line
    best = min(range(len(losses)), key=lambda i: losses[i])
    if best in (0, len(losses) - 1):
        return None
    return vertex(RATES[best - 1 : best + 2], [-loss for loss in losses[best - 1 : best + 2]])


def _newton(pair: Pair) -> float | None:
    return _positive(pair.measures.slope / pair.measures.curvature)


FORMS: dict[str, Feature] = {
    "c": lambda _pair: 1.0,
    "c/λ": lambda pair: 1 / pair.measures.largest,
    "c/√λ": lambda pair: pair.measures.largest**-0.5,
    "c·(g·u)/(uᵀHu)": _newton,
    "c/√|uᵀHu|": lambda pair: abs(pair.measures.curvature) ** -0.5,
    "c/(g·u)": lambda pair: 1 / pair.measures.slope,
    "c/size": lambda pair: 1 / pair.measures.size,
    "c/√size": lambda pair: pair.measures.size**-0.5,
    "c/(size·√λ)": lambda pair: 1 / (pair.measures.size * pair.measures.largest**0.5),
    "c/(size·g·u)^½": lambda pair: (pair.measures.size * pair.measures.slope) ** -0.5,
    "c·(best single update)": best_single_update,
    "catalogue": lambda pair: pair.cell.catalogue,
}
GIVEN = {"catalogue"}  # forms without a constant to fit


def fit(feature: Feature, pairs: Iterable[Pair]) -> float:
    """c, from the pairs that have the number at all."""
    found = [(pair.best_rate, feature(pair)) for pair in pairs]
    return math.exp(fmean(math.log(best / f) for best, f in found if f is not None))


@dataclass(frozen=True)
class Judged:
    """A prediction: the share of the best gain at it (None = not known), and whether its loss is near the best."""

    pair: Pair
    rate: float | None
    share: float | None
    loss_ratio: float | None

    @property
    def keeps_gain(self) -> bool:
        """Whether the fall of the loss is at least 95 % of the fall at the best swept rate."""
        return self.share is not None and self.share >= KEPT_GAIN

    @property
    def near_loss(self) -> bool:
        """Whether the loss is at most 5 % above the loss at the best swept rate."""
        return self.loss_ratio is not None and self.loss_ratio <= LOSS_ALLOWED


def judge(pair: Pair, rate: float | None) -> Judged:
    """Judge a predicted rate by the sweep. A rate outside of the swept ones counts as missed."""
    gain = None if rate is None else pair.gain_at(rate)
    if gain is None:
        return Judged(pair, rate, None, None)
    best = pair.best_gain
    return Judged(pair, rate, gain / best, (pair.cell.base - gain) / (pair.cell.base - best))


def leave_one_out(name: str, pairs: Sequence[Pair], group: Callable[[Pair], str]) -> list[Judged]:
    """Predict the pairs of each group with the constant fitted to all other groups."""
    feature, judged = FORMS[name], list[Judged]()
    for pair in pairs:
        others = [other for other in pairs if group(other) != group(pair)]
        f = feature(pair)
        c = 1.0 if name in GIVEN else fit(feature, others) if others else None
        judged.append(judge(pair, None if f is None or c is None else c * f))
    return judged
