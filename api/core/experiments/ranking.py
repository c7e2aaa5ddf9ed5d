"""Which initialization is better, from the results of an experiment. Numbers only: no database, no HTTP.

The statistical model (docs/decisions/0073): a result is the sum of what its treatment contributes, what its seed
contributes, and noise. A treatment is one initialization at one rank; a cell is one treatment at one learning rate. All
cells are run with the same seeds, and a seed fixes the order of the rows, so seeds are the blocks of a randomized block
design: differences are taken within a seed, and what makes a seed easy or hard drops out.

Each treatment stands in the table with its best rate. Two treatments count as different only if they differ by more
than the best cells of equally good treatments do in 95 % of experiments (`critical_range`). So at most 5 % of
experiments contain a wrong "better", although the best of several rates was chosen.

The noise is supposed to be the same for all treatments, because a few seeds tell too little about each alone. A
treatment whose results vary much more is called unsteady, and is compared by its own differences alone.
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from statistics import fmean, stdev, variance
from typing import Literal

from api.core.experiments.critical_range import CONFIDENCE, find_critical_range

Goal = Literal["min", "max"]
Cells = dict[Hashable, dict[float, dict[int, float]]]  # the finite values by treatment, rate and seed
UNSTEADY = 3.0  # times the others' noise; by chance one treatment in a hundred shows that much with 3 seeds
RELIABLE_SEEDS = 3  # with fewer, the noise is estimated from so little that its estimate is of no use


@dataclass(frozen=True)
class Result:
    """What came of one run. `value` None: it failed, or its objective was not finite, or it was `stopped` early."""

    treatment: Hashable
    learning_rate: float
    seed: int
    value: float | None
    stopped: bool = False


@dataclass(frozen=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Summary:
    """The results of one cell over its seeds. `std`: the sample standard deviation; `ci95`: Student's interval of the
    mean. Both are None for fewer than 2 results."""

    n: int
    mean: float
    std: float | None
    min: float
    max: float
    ci95: Interval | None


@dataclass(frozen=True)
class Difference:
    """How far a treatment is behind the best one, by their common seeds; above 0 when `mean` favours the best one.

    `ci95`: Student's interval of this one difference. `family_ci95`: the interval that holds together with those of all
    other comparisons of the experiment; it decides whether the two are tied. None where the noise is unknown.
    """

    n: int
    mean: float
    ci95: Interval | None
    family_ci95: Interval | None


@dataclass(frozen=True)
class Row:
    """A treatment at its best rate."""

    treatment: Hashable
    learning_rate: float | None
    values: Mapping[int, float]  # by seed
    summary: Summary | None
    by_rate: Mapping[float, Summary | None]
    at_edge: bool
    failed_runs: int
    difference: Difference | None  # None for the best one
    tied_with_best: bool


@dataclass(frozen=True)
class Noise:
    """How much a result varies apart from what its treatment and its seed contribute.

    `deviation`: its standard deviation; `degrees`: the degrees of freedom of that estimate; `critical`: how many
    standard errors of a mean count as a difference.
    """

    deviation: float
    degrees: int
    critical: float


@dataclass(frozen=True)
class Ranking:
    """The treatments from the best to the worst; those with fewer than two finished seeds stand last.

    `noise` is None if it cannot be estimated. `unsteady`: the treatments whose results vary far more than the others'.
    """

    rows: Sequence[Row]
    noise: Noise | None
    unsteady: frozenset[Hashable]


def rank(results: Sequence[Result], *, goal: Goal = "min") -> Ranking:
    """Rank the treatments of an experiment by the mean of their best rate."""
    sign = 1.0 if goal == "min" else -1.0
    cells = _collect(results)
    best = {treatment: _choose_rate(rates, sign) for treatment, rates in cells.items()}
    chosen = {treatment: rates[best[treatment]] for treatment, rates in cells.items()}
    order = sorted(chosen, key=lambda treatment: _sort_key(chosen[treatment], sign))
    compared = {treatment: chosen[treatment] for treatment in order if len(chosen[treatment]) >= 2}
    noise = _estimate_noise(list(compared.values()), cells)
    unsteady = _find_unsteady(compared) if noise else frozenset()
    failed = Counter(one.treatment for one in results if _finite(one.value) is None and not one.stopped)
    rows = []
    for index, treatment in enumerate(order):
        difference = None
        if index and treatment in compared:
            pair_noise = None if unsteady & {order[0], treatment} else noise
            difference = _compare(chosen[order[0]], chosen[treatment], sign, noise=pair_noise, cells=cells)
        rows.append(
            Row(
                treatment=treatment,
                learning_rate=best[treatment] if chosen[treatment] else None,
                values=chosen[treatment],
                summary=summarize(chosen[treatment].values()),
                by_rate={rate: summarize(values.values()) for rate, values in sorted(cells[treatment].items())},
                at_edge=best[treatment] in (min(cells[treatment]), max(cells[treatment])),
                failed_runs=failed[treatment],
                difference=difference,
                tied_with_best=index == 0 or _is_tied(difference, chosen[treatment]),
            )
        )
    return Ranking(rows, noise, unsteady)


def _is_tied(difference: Difference | None, values: Mapping[int, float]) -> bool:
    """Whether nothing shows that it is worse. A treatment without any result is tied with nobody."""
    if not values:
        return False
    return difference is None or difference.family_ci95 is None or 0.0 in difference.family_ci95


def _collect(results: Sequence[Result]) -> Cells:
    """The finite values by treatment, rate and seed; a rate at which everything failed has none."""
    cells: Cells = {}
    for result in results:
        values = cells.setdefault(result.treatment, {}).setdefault(result.learning_rate, {})
        if (value := _finite(result.value)) is not None:
            values[result.seed] = value
    return cells


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _choose_rate(rates: Mapping[float, Mapping[int, float]], sign: float) -> float:
    """The rate with the best mean, among those with the most finished seeds.

    A rate at which a seed failed would otherwise be judged by the seeds that went well. Of equal rates the lowest.
    """
    most = max(len(values) for values in rates.values())
    candidates = [rate for rate in sorted(rates) if len(rates[rate]) == most]
    return min(candidates, key=lambda rate: sign * fmean(rates[rate].values())) if most else candidates[0]


def _sort_key(values: Mapping[int, float], sign: float) -> tuple[int, float]:
    shortage = 0 if len(values) >= 2 else 2 - len(values)
    return shortage, sign * fmean(values.values()) if values else 0.0


def summarize(values: Iterable[float]) -> Summary | None:
    """Mean, spread and Student's interval; None without a value."""
    found = list(values)
    if not found:
        return None
    mean, std = fmean(found), stdev(found) if len(found) > 1 else None
    interval = None if std is None else _around(mean, _student(len(found) - 1) * std / math.sqrt(len(found)))
    return Summary(len(found), mean, std, min(found), max(found), interval)


def _estimate_noise(compared: Sequence[Mapping[int, float]], cells: Cells) -> Noise | None:
    """The noise of one result, from the best cells of the treatments; None if some pair has no two seeds in common.

    It is half the mean variance of the differences of all pairs. If every treatment has every seed, that is exactly the
    residual mean square of the two-way analysis of variance without interaction, with (k - 1)(n - 1) degrees.
    """
    pairs = [_differences(one, other) for one, other in combinations(compared, 2)]
    if not pairs or any(len(pair) < 2 for pair in pairs):
        return None
    degrees = (len(compared) - 1) * (min(map(len, pairs)) - 1)
    deviation = math.sqrt(fmean(variance(pair) for pair in pairs) / 2)
    return Noise(deviation, degrees, _find_critical_range(cells, degrees))


def _find_critical_range(cells: Cells, degrees: int) -> float:
    """The critical range for all treatments and rates that were tried.

    Those that were stopped early count, too, because they were part of the choice.
    """
    return find_critical_range(len(cells), max(map(len, cells.values())), degrees)


def _find_unsteady(treatments: Mapping[Hashable, Mapping[int, float]]) -> frozenset[Hashable]:
    """The treatments with `UNSTEADY` times the noise of the others, if there are at least three treatments.

    A variance of differences is the sum of two noises, so what a treatment adds to those of the others is its own.
    """
    pairs = {
        frozenset(pair): variance(_differences(treatments[pair[0]], treatments[pair[1]]))
        for pair in combinations(treatments, 2)
    }
    found = set()
    for treatment in treatments if len(treatments) > 2 else ():
        others = fmean(value for pair, value in pairs.items() if treatment not in pair) / 2
        own = fmean(value for pair, value in pairs.items() if treatment in pair) - others
        if own > UNSTEADY**2 * others:
            found.add(treatment)
    return frozenset(found)


def _differences(one: Mapping[int, float], other: Mapping[int, float]) -> list[float]:
    return [other[seed] - one[seed] for seed in sorted(one.keys() & other.keys())]


def _compare(
    best: Mapping[int, float], other: Mapping[int, float], sign: float, *, noise: Noise | None, cells: Cells
) -> Difference | None:
    """How far one treatment is behind the best one; None if they have no seed in common.

    Args:
        noise: of all treatments; None = the pair is compared by its own noise alone.
    """
    found = [sign * value for value in _differences(best, other)]
    if not found:
        return None
    mean, n = fmean(found), len(found)
    if n < 2:
        return Difference(n, mean, None, None)
    own = stdev(found)
    single = _around(mean, _student(n - 1) * own / math.sqrt(n))
    if noise is None:
        half = _find_critical_range(cells, n - 1) * own / math.sqrt(2)
    else:
        # The pair's own noise where it is larger, because one treatment may be somewhat less steady than the others.
        half = noise.critical * max(noise.deviation, own / math.sqrt(2))
    return Difference(n, mean, single, _around(mean, half / math.sqrt(n)))


def _around(middle: float, half: float) -> Interval:
    return Interval(middle - half, middle + half)


@lru_cache
def _student(degrees: int) -> float:
    """The factor of Student's two-sided interval."""
    from scipy.stats import t  # here, because importing it takes a second

    return float(t.ppf((1 + CONFIDENCE) / 2, degrees))
