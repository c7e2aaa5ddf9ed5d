"""Prints how often simulated experiments claim a difference: wrongly where there is none, and rightly where there is.

    python -m benchmarks.experiment_power [--experiments 1000] [--seed 0]

The ranking is the service's own. Beside it stands what Holm's method with paired t-tests of every pair would have found
in the same experiments, and the power that the service promises in the plan of an experiment.
"""

import argparse
from itertools import combinations
from statistics import fmean, stdev

from scipy import stats

from api.core.experiments.power import find_detectable, find_power
from api.core.experiments.ranking import Result, rank
from tests.api.core.experiments.simulated import Design, simulate

NULLS = (Design(2, 1, 3), Design(6, 1, 3), Design(6, 4, 3), Design(12, 4, 3), Design(6, 3, 5), Design(6, 3, 10))
DIFFERENCES = (1.0, 2.0, 3.0, 4.0)


def claims_of_holm(results: list[Result]) -> set[tuple[object, object]]:
    """The pairs (better, worse) of best cells that Holm's method calls different, in 5 % of experiments wrongly."""
    rows = [row for row in rank(results).rows if len(row.values) > 1]
    tests = []
    for one, other in combinations(rows, 2):
        found = [other.values[seed] - one.values[seed] for seed in one.values]
        statistic = fmean(found) / (stdev(found) / len(found) ** 0.5)
        p = 2 * float(stats.t.sf(abs(statistic), len(found) - 1))
        pair = (one.treatment, other.treatment) if statistic > 0 else (other.treatment, one.treatment)
        tests.append((p, pair))
    tests.sort()
    claimed = set()
    for place, (p, pair) in enumerate(tests):
        if p > 0.05 / (len(tests) - place):
            break
        claimed.add(pair)
    return claimed


def only_one_rate(treatment: int, rate: int) -> float:
    """The first treatment has several good rates and the others one each: the worst case for choosing a rate."""
    return 20.0 if treatment and rate else 0.0


def print_null(experiments: int, seed: int) -> None:
    print("No true difference: share of experiments with a wrong claim\n")
    print(
        "| treatments | rates | seeds | ours, all cells equal | ours, one good rate each | Holm, one good rate each |"
    )
    print("|---|---|---|---|---|---|")
    for design in NULLS:
        equal = gapped = holm = 0
        for number in range(experiments):
            equal += any(not row.tied_with_best for row in rank(simulate(design, seed=seed + number)).rows)
            found = simulate(design, mean=only_one_rate, seed=seed + number)
            gapped += any(not row.tied_with_best for row in rank(found).rows)
            holm += bool(claims_of_holm(found))
        shares = " | ".join(f"{count / experiments:.1%}" for count in (equal, gapped, holm))
        print(f"| {design.treatments} | {design.rates} | {design.seeds} | {shares} |", flush=True)


def print_power(experiments: int, seed: int) -> None:
    treatments, rates = 6, 3
    print("\nOne of 6 treatments is better at each of 3 rates: share of experiments that call it better than another\n")
    print("| seeds | difference, in deviations of the noise | ours | Holm | promised |")
    print("|---|---|---|---|---|")
    for seeds in (3, 5, 10):
        for difference in DIFFERENCES:
            ours = holm = 0
            for number in range(experiments):
                found = simulate(
                    Design(treatments, rates, seeds),
                    mean=lambda treatment, rate, gap=difference: gap * (treatment > 0) + 20.0 * (rate > 0),
                    seed=seed + number,
                )
                rows = {row.treatment: row for row in rank(found).rows}
                ours += rows[0].difference is None and not rows[1].tied_with_best
                holm += (0, 1) in claims_of_holm(found)
            promised = find_power(difference, treatments=treatments, rates=rates, seeds=seeds)
            shares = " | ".join(f"{share:.1%}" for share in (ours / experiments, holm / experiments, promised))
            print(f"| {seeds} | {difference:.0f} | {shares} |", flush=True)
    print("\nDifference that four of five experiments find, 6 treatments at 3 rates:")
    for seeds in (2, 3, 4, 5, 7, 10, 20):
        print(f"  {seeds:2d} seeds: {find_detectable(treatments=6, rates=3, seeds=seeds)} deviations")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print_null(options.experiments, options.seed)
    print_power(options.experiments, options.seed)


if __name__ == "__main__":
    main()
