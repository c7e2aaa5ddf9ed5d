"""Which cells go on at a rung, and what a schedule costs."""

import math

from api.core.experiments.halving import Standing, choose_survivors, find_cost


def cell(treatment: str, rate: float, *losses: float) -> Standing:
    return Standing(treatment, rate, dict(enumerate(losses)))


def test_the_best_third_goes_on() -> None:
    cells = [cell(name, 1.0, loss, loss + 1) for name, loss in zip("abcdefgh", (5, 1, 4, 2, 8, 3, 7, 6), strict=True)]
    assert [one.treatment for one in choose_survivors(cells)] == ["b", "d", "f"]


def test_two_at_least_go_on() -> None:
    assert len(choose_survivors([cell(name, 1.0, loss) for name, loss in (("a", 1.0), ("b", 2.0), ("c", 3.0))])) == 2


def test_a_cell_without_a_finite_loss_never_goes_on() -> None:
    cells = [cell("a", 1.0), cell("b", 1.0, math.nan), cell("c", 1.0, 9.0), cell("d", 1.0, math.inf)]
    assert [one.treatment for one in choose_survivors(cells)] == ["c"]


def test_of_two_neighbouring_rates_that_are_nearly_equal_the_higher_goes_on() -> None:
    cells = [cell("a", 1e-4, 2.000), cell("a", 3e-4, 2.005), cell("a", 1e-3, 2.5)]
    cells += [cell("b", rate, 2.1 + rate) for rate in (1e-4, 3e-4, 1e-3)]
    assert ("a", 3e-4) in [(one.treatment, one.learning_rate) for one in choose_survivors(cells)]
    assert len(choose_survivors(cells)) == 2


def test_twenty_four_cells_cost_less_than_six_whole_runs() -> None:
    assert find_cost(24) < 6
