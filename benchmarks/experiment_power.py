"""Prints how often simulated experiments claim a difference: wrongly where there is none, and rightly where there is.

    python -m benchmarks.experiment_power [--experiments 1000] [--seed 0]

The ranking is the service's own. Beside it stand what two other rules would have claimed in the same experiments
(Holm's method with paired t-tests of every pair, and Tukey's range over all cells of the grid), and the power that the
service promises in the plan of an experiment. The last line, what halving costs, is computed and not simulated.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from statistics import fmean, stdev

from scipy import stats

from api.core.experiments.critical_range import find_critical_range
from api.core.experiments.halving import find_cost
from api.core.experiments.power import find_detectable, find_power
from api.core.experiments.ranking import Ranking, Result, rank
from tests.api.core.experiments.simulated import Design, simulate

NULLS = (Design(2, 1, 3), Design(6, 1, 3), Design(6, 4, 3), Design(12, 4, 3), Design(6, 3, 5), Design(6, 3, 10))
NOISY = (Design(6, 1, 3), Design(6, 4, 3), Design(6, 4, 5), Design(6, 4, 10))
DIFFERENCES = (1.0, 2.0, 3.0, 4.0)
Pair = tuple[object, object]  # (better, worse)


def claims_of_ours(ranking: Ranking) -> set[Pair]:
    """The pairs of which the ranking calls the second worse."""
    best = ranking.rows[0].treatment
    return {(best, row.treatment) for row in ranking.rows if not row.tied_with_best}


def claims_of_holm(ranking: Ranking) -> set[Pair]:
    """The pairs of best cells that Holm's method calls different at 5 %."""
    tests = []
    for one, other in combinations([row for row in ranking.rows if len(row.values) > 1], 2):
        found = [other.values[seed] - one.values[seed] for seed in one.values]
        statistic = fmean(found) / (stdev(found) / len(found) ** 0.5)
        p = 2 * float(stats.t.sf(abs(statistic), len(found) - 1))
        pair = (one.treatment, other.treatment) if statistic > 0 else (other.treatment, one.treatment)
        tests.append((p, pair))
    tests.sort(key=lambda test: test[0])
    claimed = set()
    for place, (p, pair) in enumerate(tests):
        if p > 0.05 / (len(tests) - place):
            break
        claimed.add(pair)
    return claimed


def claims_of_tukey(ranking: Ranking) -> set[Pair]:
    """The pairs with the best one that differ by more than the range of as many equal cells as the grid has."""
    if ranking.noise is None:
        return set()
    cells = sum(len(row.by_rate) for row in ranking.rows)
    first, *others = ranking.rows
    standard_error = ranking.noise.deviation / len(first.values) ** 0.5
    half = find_critical_range(cells, 1, ranking.noise.degrees) * standard_error
    return {(first.treatment, row.treatment) for row in others if row.difference and row.difference.mean > half}


RULES: Sequence[Callable[[Ranking], set[Pair]]] = (claims_of_ours, claims_of_tukey, claims_of_holm)


def only_one_rate(treatment: int, rate: int) -> float:
    """The first treatment has several good rates and the others one each: the worst case for choosing a rate."""
    return 20.0 if treatment and rate else 0.0


def count(rankings: Iterator[Ranking], wanted: Pair | None) -> list[int]:
    """For each rule, in how many experiments it claims the wanted pair, or any pair."""
    counts = [0] * len(RULES)
    for ranking in rankings:
        for place, rule in enumerate(RULES):
            claimed = rule(ranking)
            counts[place] += bool(claimed) if wanted is None else wanted in claimed
    return counts


def print_null(experiments: int, seed: int) -> None:
    print("No true difference, one good rate each but for the first: share of experiments with a wrong claim\n")
    print("| treatments | rates | seeds | ours | Tukey over all cells | Holm |\n|---|---|---|---|---|---|")
    for design in NULLS:
        made = (rank(simulate(design, mean=only_one_rate, seed=seed + number)) for number in range(experiments))
        shares = " | ".join(f"{found / experiments:.1%}" for found in count(made, None))
        print(f"| {design.treatments} | {design.rates} | {design.seeds} | {shares} |", flush=True)
    print("\nNo true difference, and the last treatment has four times the noise of the others\n")
    print("| treatments | rates | seeds | ours | Tukey over all cells | Holm |\n|---|---|---|---|---|---|")
    for design in NOISY:
        noise = [1.0] * (design.treatments - 1) + [4.0]
        made = (rank(simulate(design, noise=noise, seed=seed + number)) for number in range(experiments))
        shares = " | ".join(f"{found / experiments:.1%}" for found in count(made, None))
        print(f"| {design.treatments} | {design.rates} | {design.seeds} | {shares} |", flush=True)


def make_planted(difference: float, seeds: int, *, experiments: int, seed: int) -> Iterator[Ranking]:
    """Experiments of 6 treatments at 3 rates, of which the first treatment is better."""

    def mean(treatment: int, rate: int) -> float:
        return difference * (treatment > 0) + 20.0 * (rate > 0)

    for number in range(experiments):
        results: list[Result] = simulate(Design(6, 3, seeds), mean=mean, seed=seed + number)
        yield rank(results)


def print_power(experiments: int, seed: int) -> None:
    print(
        "\nOne of 6 treatments is better, at 3 rates: share of experiments that call it better than a given other one\n"
    )
    print("| seeds | difference, in deviations of the noise | ours | Tukey over all cells | Holm | promised |")
    print("|---|---|---|---|---|---|")
    for seeds in (3, 5, 10):
        for difference in DIFFERENCES:
            found = count(make_planted(difference, seeds, experiments=experiments, seed=seed), (0, 1))
            promised = find_power(difference, treatments=6, rates=3, seeds=seeds)
            shares = " | ".join(f"{share:.1%}" for share in (*(one / experiments for one in found), promised))
            print(f"| {seeds} | {difference:.0f} | {shares} |", flush=True)
    print("\nDifference that four of five experiments find, 6 treatments at 3 rates:")
    for seeds in (2, 3, 4, 5, 7, 10, 20):
        print(f"  {seeds:2d} seeds: {find_detectable(treatments=6, rates=3, seeds=seeds)} deviations")
    print("\nWhat halving costs, in whole runs: " + ", ".join(f"{n} cells {find_cost(n):.1f}" for n in (6, 12, 24, 48)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print_null(options.experiments, options.seed)
    print_power(options.experiments, options.seed)


if __name__ == "__main__":
    main()
