"""The statistics of experiments, against textbook formulae and against experiments whose truth is known."""

import math
import random
from statistics import fmean, stdev

import pytest
from scipy import stats

from api.core.experiments import critical_range
from api.core.experiments.critical_range import find_critical_range
from api.core.experiments.ranking import Ranking, Result, rank
from tests.api.core.experiments.simulated import (
    Design,
    claims_any_difference,
    claims_better,
    count_claims,
    simulate,
)

SEEDS = (1, 2, 3)


def results(*rows: tuple[str, float, list[float | None]]) -> list[Result]:
    """(treatment, rate, values by seed) as results."""
    return [
        Result(treatment, rate, seed, value)
        for treatment, rate, values in rows
        for seed, value in enumerate(values, start=1)
    ]


def test_each_treatment_stands_with_the_rate_of_the_best_mean() -> None:
    ranking = rank(
        results(("a", 1.0, [3.0, 3.2]), ("a", 2.0, [2.0, 2.2]), ("b", 1.0, [1.0, 1.2]), ("b", 2.0, [9.0, 0.0]))
    )
    assert [(row.treatment, row.learning_rate) for row in ranking.rows] == [("b", 1.0), ("a", 2.0)]


def test_more_is_better_if_the_goal_says_so() -> None:
    ranking = rank(results(("a", 1.0, [0.5, 0.6]), ("b", 1.0, [0.7, 0.8])), goal="max")
    assert [row.treatment for row in ranking.rows] == ["b", "a"]
    assert ranking.rows[1].difference is not None
    assert ranking.rows[1].difference.mean == pytest.approx(0.2)  # positive: worse


def test_a_rate_at_which_a_seed_failed_is_not_judged_by_the_seeds_that_went_well() -> None:
    ranking = rank(results(("a", 1.0, [2.0, 2.0]), ("a", 2.0, [1.0, None]), ("a", 3.0, [math.nan, 0.0])))
    (row,) = ranking.rows
    assert (row.learning_rate, row.failed_runs) == (1.0, 2)


@pytest.mark.parametrize(("best", "edge"), [(1.0, True), (2.0, False), (3.0, True)])
def test_a_best_rate_at_the_edge_is_marked(best: float, edge: bool) -> None:
    ranking = rank(results(*(("a", rate, [0.0 if rate == best else 1.0] * 2) for rate in (1.0, 2.0, 3.0))))
    assert ranking.rows[0].at_edge is edge


def test_with_fewer_than_two_seeds_a_treatment_is_ranked_last_and_compared_with_nothing() -> None:
    ranking = rank(results(("a", 1.0, [0.0, None]), ("b", 1.0, [5.0, 5.1]), ("c", 1.0, [None, None])))
    assert [row.treatment for row in ranking.rows] == ["b", "a", "c"]
    assert [row.difference for row in ranking.rows] == [None, None, None]
    assert ranking.rows[2].summary is None


def test_the_interval_of_a_mean_is_students() -> None:
    values = [0.8395, 0.8410, 0.8437]
    (row,) = rank(results(("a", 1.0, values))).rows  # type: ignore[list-item]
    assert row.summary is not None and row.summary.ci95 is not None
    low, high = stats.t.interval(0.95, 2, loc=fmean(values), scale=stats.sem(values))
    assert (row.summary.ci95.low, row.summary.ci95.high) == pytest.approx((low, high))
    assert row.summary.std == pytest.approx(stdev(values))


def test_the_interval_of_a_difference_is_the_paired_one() -> None:
    one, other = [5.0, 6.1, 7.3, 4.0], [5.5, 6.4, 7.9, 4.2]
    ranking = rank(results(("a", 1.0, one), ("b", 1.0, other)))  # type: ignore[list-item]
    expected = stats.ttest_rel(other, one).confidence_interval(0.95)
    found = ranking.rows[1].difference
    assert found is not None and found.ci95 is not None
    assert (found.ci95.low, found.ci95.high) == pytest.approx((expected.low, expected.high))


def test_the_noise_is_the_residual_of_the_two_way_analysis_of_variance() -> None:
    found = simulate(Design(5, 1, 4), seed=3)
    values = {(one.treatment, one.seed): one.value or 0.0 for one in found}
    rows, columns = range(5), range(4)
    overall = fmean(values.values())
    row_means = [fmean(values[row, column] for column in columns) for row in rows]
    column_means = [fmean(values[row, column] for row in rows) for column in columns]
    residuals = [
        values[row, column] - row_means[row] - column_means[column] + overall for row in rows for column in columns
    ]
    ranking = rank(found)
    assert ranking.noise is not None and ranking.noise.degrees == 12
    assert ranking.noise.deviation == pytest.approx(math.sqrt(sum(value**2 for value in residuals) / 12))


def test_two_treatments_at_one_rate_are_compared_by_students_paired_test() -> None:
    """Tukey's range of two means is Student's t times the root of two, so the family of one pair costs nothing."""
    ranking = rank(simulate(Design(2, 1, 6), seed=1))
    found = ranking.rows[1].difference
    assert found is not None and found.ci95 is not None and found.family_ci95 is not None
    assert (found.family_ci95.low, found.family_ci95.high) == pytest.approx((found.ci95.low, found.ci95.high), rel=1e-4)


def test_seeds_that_differ_much_hide_no_difference() -> None:
    ranking = rank(
        results(("a", 1.0, [1.0, 11.0, 21.01]), ("b", 1.0, [2.0, 12.01, 22.0]), ("c", 1.0, [1.01, 11.0, 21.0]))
    )
    tied = {row.treatment: row.tied_with_best for row in ranking.rows}
    assert tied == {"a": True, "b": False, "c": True}


def test_with_one_seed_nothing_is_claimed() -> None:
    ranking = rank(results(("a", 1.0, [1.0]), ("b", 1.0, [100.0])))
    assert ranking.noise is None
    assert all(row.tied_with_best for row in ranking.rows)


def one_good_rate(treatment: int, rate: int) -> float:
    """Only the first treatment has several good rates, so it gains most from choosing the best one."""
    return 20.0 if treatment and rate else 0.0


def all_equal(treatment: int, rate: int) -> float:
    return 0.0


@pytest.mark.parametrize(
    ("design", "mean"),
    [
        (Design(6, 4, 3), all_equal),
        (Design(6, 4, 3), one_good_rate),
        pytest.param(Design(8, 3, 5), all_equal, marks=pytest.mark.slow),
        pytest.param(Design(8, 3, 5), one_good_rate, marks=pytest.mark.slow),
        (Design(2, 1, 3), all_equal),  # with one rate there is none that is better
        pytest.param(Design(12, 1, 3), all_equal, marks=pytest.mark.slow),
        (Design(3, 1, 10), all_equal),
    ],
)
def test_without_a_true_difference_at_most_one_in_twenty_experiments_claims_one(design: Design, mean: object) -> None:
    assert count_claims(design, experiments=1000, claim=claims_any_difference, mean=mean) <= 0.05


@pytest.mark.parametrize("pattern", [0, *(pytest.param(one, marks=pytest.mark.slow) for one in range(1, 8))])
def test_whichever_rates_are_good_at_most_one_in_twenty_experiments_claims_a_difference(pattern: int) -> None:
    """The critical range supposes that rates are good or useless. Here many are nearly good, at random."""
    draw = random.Random(pattern)
    behind = [[0.0] + [draw.choice((0.0, 0.2, 0.5, 1.0, 20.0)) for _ in range(3)] for _ in range(6)]
    claimed = count_claims(
        Design(6, 4, 3),
        experiments=1000,
        claim=claims_any_difference,
        mean=lambda treatment, rate: behind[treatment][rate],
    )
    assert claimed <= 0.05


def test_with_one_rate_the_critical_range_is_tukeys() -> None:
    for treatments, degrees in ((2, 2), (6, 10), (12, 40)):
        expected = float(stats.studentized_range.ppf(0.95, treatments, degrees))
        assert find_critical_range(treatments, 1, degrees) == expected
        # The integral that is used for several rates gives the same.
        found = critical_range._find_quantile(treatments, 1, 1, degrees, expected + 5)
        assert found == pytest.approx(expected, rel=0.005)


def test_differences_without_control_would_be_claimed_too_often() -> None:
    """What the family costs is needed: Student's intervals alone are wrong in far more than one in twenty."""

    def careless(ranking: object) -> bool:
        return any(
            row.difference is not None and row.difference.ci95 is not None and 0.0 not in row.difference.ci95
            for row in ranking.rows  # type: ignore[attr-defined]
        )

    assert count_claims(Design(6, 4, 3), experiments=300, claim=careless, mean=one_good_rate) > 0.2


@pytest.mark.parametrize("noise", [(4.0, 1.0, 1.0, 1.0, 1.0, 1.0), (1.0, 1.0, 1.0, 1.0, 1.0, 4.0)])
def test_one_unsteady_treatment_at_most_doubles_the_wrong_claims(noise: tuple[float, ...]) -> None:
    assert count_claims(Design(6, 4, 3), experiments=1000, claim=claims_any_difference, noise=noise) <= 0.1


def test_an_unsteady_treatment_is_named_and_a_steady_one_is_not() -> None:
    def names_the_first(ranking: Ranking) -> bool:
        return ranking.unsteady == {0}

    unsteady = (10.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    assert count_claims(Design(6, 1, 5), experiments=200, claim=names_the_first, noise=unsteady) > 0.9
    assert count_claims(Design(6, 1, 5), experiments=500, claim=lambda ranking: bool(ranking.unsteady)) < 0.05


def test_a_large_difference_is_found() -> None:
    found = count_claims(
        Design(6, 2, 3), experiments=200, claim=claims_better(2, 4), mean=lambda treatment, rate: 8.0 * (treatment != 2)
    )
    assert found > 0.95
