"""What an experiment can find, against simulated experiments with a planted difference."""

import math

import pytest

from api.core.experiments.power import describe_plan, find_detectable, find_power
from tests.api.core.experiments.simulated import Design, claims_better, count_claims

TRIALS = 400
FEW = {(3, 3.0), (5, 2.0), (10, 1.0)}  # where the power is neither nothing nor all; the others are slow


@pytest.mark.parametrize(
    ("seeds", "difference"),
    [
        pytest.param(seeds, difference, marks=() if (seeds, difference) in FEW else pytest.mark.slow)
        for seeds in (3, 5, 10)
        for difference in (1.0, 2.0, 3.0, 4.0)
    ],
)
def test_the_power_is_that_of_simulated_experiments(seeds: int, difference: float) -> None:
    """One treatment is better than all others by the difference, and is compared with one of them."""
    expected = find_power(difference, treatments=5, rates=1, seeds=seeds)
    found = count_claims(
        Design(5, 1, seeds),
        experiments=TRIALS,
        claim=claims_better(0, 3),
        mean=lambda treatment, rate: difference * (treatment > 0),
    )
    assert found == pytest.approx(expected, abs=3 * math.sqrt(0.25 / TRIALS))


def test_more_seeds_find_smaller_differences() -> None:
    found = [find_detectable(treatments=6, rates=4, seeds=seeds) for seeds in (3, 5, 10)]
    assert all(value is not None for value in found)
    assert found == sorted(found, reverse=True)  # type: ignore[type-var]


def test_more_rates_need_larger_differences() -> None:
    one, four = (find_detectable(treatments=6, rates=rates, seeds=5) for rates in (1, 4))
    assert one is not None and four is not None and one < four


def test_one_seed_finds_nothing() -> None:
    assert find_detectable(treatments=6, rates=4, seeds=1) is None
    assert "at least 3 seeds" in describe_plan(treatments=6, rates=4, seeds=1)


def test_the_plan_says_what_more_seeds_would_bring() -> None:
    text = describe_plan(treatments=6, rates=4, seeds=3)
    assert text.startswith("With 3 seeds, a difference of ")
    assert "with 5" in text and "with 10" in text
