"""What is tried for a job with an automatic initialization, how long, and who wins."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.core.experiments import probe
from api.core.experiments.halving import Standing
from lorainit.config.inits import INITS


def standing(method: int, rate: float, *losses: float) -> Standing:
    return Standing((method, 8), rate, dict(enumerate(losses)))


@given(
    steps=st.integers(1, 5000),
    ratio=st.floats(0, 0.5),
    budget=st.integers(1, 2000),
    available=st.integers(1, 12),
)
def test_a_probe_stays_within_its_budget_and_looks_behind_the_warm_up(
    steps: int, ratio: float, budget: int, available: int
) -> None:
    warmup = math.ceil(ratio * steps)
    plan = probe.plan(steps, warmup=warmup, budget=budget, available=available)
    if plan is not None:
        first, second = plan.looks
        assert plan.cost <= budget
        assert warmup < first < second < steps
        assert 2 <= plan.candidates <= min(available, probe.MOST)


def test_the_cost_is_that_of_all_candidates_but_the_chosen_one() -> None:
    plan = probe.ProbePlan(candidates=5, looks=(40, 100))
    stopped_at = [40, 40, 40, 100]
    assert plan.cost == sum(stopped_at)


def test_a_long_job_tries_as_many_candidates_as_there_are_and_a_short_one_none() -> None:
    def candidates(steps: int) -> int:
        found = probe.plan(steps, warmup=math.ceil(0.03 * steps), budget=steps // 4, available=probe.MOST)
        return 0 if found is None else found.candidates

    assert (candidates(1000), candidates(128), candidates(50)) == (6, 4, 0)


def test_the_least_number_of_steps_is_enough_and_one_less_is_not() -> None:
    least = probe.find_least_steps(warmup_ratio=0.03)
    assert least is not None
    found = [
        probe.plan(steps, warmup=math.ceil(0.03 * steps), budget=int(probe.BUDGET * steps), available=probe.MOST)
        for steps in (least - 1, least)
    ]
    assert found[0] is None and found[1] is not None


def test_with_a_warm_up_of_half_the_job_no_length_is_enough() -> None:
    assert probe.find_least_steps(warmup_ratio=0.5) is None


def test_of_equally_good_candidates_the_cheapest_wins_at_its_higher_rate() -> None:
    found = probe.sort_candidates(
        [standing(2, 1e-3, 1.000), standing(0, 1e-3, 1.004), standing(0, 3e-3, 1.006), standing(1, 1e-3, 1.5)]
    )
    assert [(one.treatment, one.learning_rate) for one in found] == [
        ((0, 8), 3e-3), ((0, 8), 1e-3), ((2, 8), 1e-3), ((1, 8), 1e-3),
    ]  # fmt: skip


def test_a_better_candidate_wins_whatever_it_costs() -> None:
    found = probe.sort_candidates([standing(0, 1e-3, 1.05), standing(3, 1e-3, 1.0)])
    assert found[0].treatment == (3, 8)


def test_a_candidate_without_a_finite_loss_is_never_chosen() -> None:
    found = probe.sort_candidates([standing(0, 1.0), standing(1, 1.0, math.nan), standing(2, 1.0, 9.0)])
    assert [one.treatment for one in found] == [(2, 8)]


@pytest.mark.parametrize("own", [True, False])
def test_candidates_differ_and_begin_with_usual_rates(own: bool) -> None:
    found = probe.list_candidates(len(probe.METHODS), own=own, fixed_rate=False)
    assert len(set(found)) == len(found) >= probe.FEWEST
    assert found[0].factor == found[1].factor == 1.0
    assert {one.method for one in found} == set(range(len(probe.METHODS)))


def test_with_a_rate_of_the_callers_only_methods_are_tried() -> None:
    assert [one.method for one in probe.list_candidates(3, own=False, fixed_rate=True)] == [0, 1, 2]


def test_our_candidates_need_no_training_before_their_start() -> None:
    assert all(INITS[name].facts.needs != "preheat" for name in probe.METHODS)
