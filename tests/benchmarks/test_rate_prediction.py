"""`rate_prediction`: which rate a sweep tries next, and how predictions are fitted and judged."""

import math

import pytest

from benchmarks.rate_fit import FORMS, Pair, fit, judge, leave_one_out, vertex
from benchmarks.rate_prediction import page, pairs
from benchmarks.rate_records import RATES, Cell, Measures, Point, next_step, read_cell, write_record


def cell(method="kaiming", data="gsm8k", *, losses, catalogue=1e-3, first=-4):
    """A sweep whose rates are on the grid, from 10^(first/3) upwards."""
    points = [Point(10 ** ((first + i) / 3), loss, 1.0) for i, loss in enumerate(losses)]
    return Cell(method, data, 0, catalogue, base=2.0, start=2.0, points=points)


def measures(method="kaiming", data="gsm8k", **known):
    """Measures of no interest, but for `known`."""
    line = [abs(math.log(rate / 1e-3)) for rate in RATES]
    values = {"slope": 1.0, "curvature": 1.0, "size": 1.0, "gradient_norm": 1.0, "largest": 1.0, "smallest": -1.0}
    values |= {"residual": 0.01, "loss": 2.0, "gradients": 15, "line": line, "seconds": 1.0}
    return Measures(method=method, data=data, seed=0, **(values | known))


def pair(method, data, best, **known):
    """A method on data whose best rate is `best`: a parabola over the logarithm of the rate."""
    steps = range(-14, -2)
    losses = [1.0 + 0.1 * math.log(10 ** (step / 3) / best) ** 2 for step in steps]
    return Pair(cell(method, data, losses=losses, first=-14), measures(method, data, **known))


# --- sweeps --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "narrow", "wide"),
    [
        ([], -9, -9),  # the catalogue's rate
        ([1.2], -3, -3),
        ([1.2, 1.1], -2, -2),  # the higher one is better, so the sweep goes on there
        ([1.1, 1.2], -5, -5),
        ([1.1, 1.0, 1.1], None, None),
        ([1.03, 1.0, 1.1], None, -5),  # the lower end keeps 97 % of the gain of the best
    ],
)
def test_a_sweep_goes_on_until_the_best_rate_is_between_worse_ones(losses, narrow, wide):
    swept = cell(losses=losses, first=-4)
    expected = {False: narrow, True: wide}
    assert {widely: next_step(swept, widely=widely) for widely in (False, True)} == expected


def test_a_rate_at_which_a_run_diverged_is_an_end_of_its_sweep():
    assert next_step(cell(losses=[1.2, 1.0, None]), widely=True) is None


def test_a_sweep_is_read_as_it_was_written(tmp_path):
    swept = cell(losses=[1.2, 1.0, None])
    write_record(tmp_path / "a" / "cell.json", swept)
    assert read_cell(tmp_path / "a" / "cell.json") == swept


# --- fits ----------------------------------------------------------------------------------------


def test_the_best_rate_is_the_vertex_of_a_parabola_in_the_logarithm():
    rates = [1e-4, 1e-3, 1e-2]
    gains = [-((math.log10(rate) + 2.8) ** 2) for rate in rates]
    assert vertex(rates, gains) == pytest.approx(10**-2.8)


def test_without_neighbours_on_both_sides_the_best_rate_is_the_best_swept_one():
    assert vertex([1e-3, 1e-2], [1.0, 2.0]) == 1e-2


def test_a_form_that_holds_predicts_every_pair_from_the_others():
    found = [
        pair(method, data, 3e-3 * scale / curvature, largest=curvature / scale)
        for method, curvature in (("kaiming", 1.0), ("pissa", 10.0), ("loram", 4.0))
        for data, scale in (("gsm8k", 1.0), ("examples", 2.0))
    ]
    assert fit(FORMS["c/λ"], found) == pytest.approx(3e-3, rel=0.01)
    for group in (lambda p: p.cell.method, lambda p: p.cell.data):
        assert all(one.keeps_gain and one.near_loss for one in leave_one_out("c/λ", found, group))
        assert not all(one.keeps_gain for one in leave_one_out("c", found, group))


def test_the_constant_comes_from_the_other_groups_only():
    found = [pair("kaiming", "gsm8k", 1e-3), pair("pissa", "gsm8k", 1e-4), pair("pissa", "examples", 1e-4)]
    rates = [one.rate for one in leave_one_out("c", found, lambda p: p.cell.method)]
    assert rates == pytest.approx([1e-4, 1e-3, 1e-3], rel=0.01)


def test_the_catalogues_rates_are_judged_as_they_are():
    found = [pair("kaiming", "gsm8k", 1e-3), pair("pissa", "gsm8k", 1e-4)]
    assert [one.rate for one in leave_one_out("catalogue", found, lambda p: p.cell.method)] == [1e-3, 1e-3]


def test_a_prediction_is_judged_on_a_straight_line_between_swept_rates():
    found = Pair(cell(losses=[1.4, 1.0, 1.2], first=-4), measures())
    between = judge(found, 10 ** (-3.5 / 3))
    assert between.share == pytest.approx(0.8) and between.loss_ratio == pytest.approx(1.2)
    assert not between.keeps_gain and not between.near_loss


@pytest.mark.parametrize("rate", [1e-9, 1.0, None])
def test_a_prediction_beyond_the_swept_rates_is_missed(rate):
    judged = judge(Pair(cell(losses=[1.4, 1.0, 1.2]), measures()), rate)
    assert not judged.keeps_gain and not judged.near_loss


def test_a_prediction_just_beyond_the_swept_rates_is_judged_as_the_outermost_one():
    found = Pair(cell(losses=[1.04, 1.0, 1.2], first=-4), measures())
    assert judge(found, 10 ** (-4.4 / 3)).share == pytest.approx(0.96)
    assert judge(found, 10 ** (-4.6 / 3)).share is None


def test_a_loss_that_does_not_bend_up_predicts_nothing():
    assert FORMS["c·(g·u)/(uᵀHu)"](pair("kaiming", "gsm8k", 1e-3, curvature=-1.0)) is None


def test_the_best_single_update_is_read_off_the_line():
    line = [(math.log10(rate) + 2.5) ** 2 for rate in RATES]
    assert FORMS["c·(best single update)"](pair("kaiming", "gsm8k", 1e-3, line=line)) == pytest.approx(10**-2.5)


def test_the_page_counts_the_pairs_that_are_swept_and_measured(tmp_path):
    for method, best in (("kaiming", 1e-3), ("pissa", 1e-4)):
        found = pair(method, "gsm8k", best)
        write_record(tmp_path / "cells" / f"{method}-gsm8k-0.json", found.cell)
        write_record(tmp_path / "measures" / f"{method}-gsm8k-0.json", found.measures)
    write_record(tmp_path / "cells" / "loram-gsm8k-0.json", cell("loram", losses=[1.0, 1.1]))
    shown = page(pairs(tmp_path))
    assert "| 2 pairs |" in shown and "| c/λ |" in shown and "`loram`" not in shown
