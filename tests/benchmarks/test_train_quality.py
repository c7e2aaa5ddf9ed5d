"""Time to quality: seconds until a loss, and the table. The runs themselves are those of test_train.py."""

import pytest

from benchmarks.train_child import Failed
from benchmarks.train_plan import Work, quality_spec
from benchmarks.train_quality import find_seconds, make_table, read_curve
from lorainit.config.inits import INITS
from lorainit.config.spec import RunSpec


def test_a_loss_between_two_evaluations_is_reached_on_the_line_between_them():
    assert find_seconds([(10.0, 3.0), (20.0, 2.0)], 2.25) == pytest.approx(17.5)
    assert find_seconds([(10.0, 3.0), (20.0, 2.0)], 3.5) == 10.0
    assert find_seconds([(10.0, 3.0), (20.0, 2.0)], 1.9) is None


def event(step, *, at, seconds, loss=1.0, valid=None):
    values = {"kind": "metrics", "step": step, "at": at, "seconds": seconds, "train_loss": loss}
    return {**values, "full_valid_loss": valid}


def test_seconds_include_the_start_and_leave_out_later_evaluations():
    events = [
        event(0, at=108.0, seconds=0.0, loss=None, valid=3.0),
        event(1, at=112.0, seconds=2.0),
        event(2, at=150.0, seconds=4.0, valid=2.0),
    ]
    assert read_curve(events, 100.0) == [(14.0, 2.0)]


def test_a_run_that_tells_no_step_is_no_measurement():
    with pytest.raises(Failed):
        read_curve([], 100.0)


def test_the_table_has_shares_of_the_rivals_seconds_the_fastest_first():
    rows = {
        "trl-defaults": {"seconds": 100.0, "loss": 1.0},
        "slow": {"curve": [(90.0, 0.9)], "judged": 0.9},
        "fast": {"curve": [(30.0, 0.9)], "judged": 0.9},
        "never": {"curve": [(30.0, 1.2)], "judged": 1.2},
        "broken": {"skipped": "exit code 1"},
    }
    lines = make_table(rows)
    told = [line for line in lines if line.startswith("| `")]
    assert [line.split("`")[1] for line in told] == ["fast", "slow", "never"]
    assert "0.30" in told[0] and "**met**" in told[0]
    assert "0.90" in told[1] and "**missed**" in told[1]
    assert "not reached" in told[2] and "**missed**" in told[2]
    assert "broken" in lines[-1] and "exit code 1" in lines[-1]


def test_without_the_rival_there_is_no_table():
    assert make_table({"fast": {"curve": [(30.0, 0.9)], "judged": 0.9}}) == ["Not measured."]


@pytest.mark.parametrize("init", [name for name, kind in INITS.items() if None in kind.facts.quantization])
def test_our_runs_are_our_recommended_recipe(init, tmp_path):
    spec = RunSpec.model_validate(quality_spec(Work(steps=80), init, base=tmp_path, rows=tmp_path, cache=tmp_path))
    assert spec.training.learning_rate is None and spec.lora.alpha == "auto"
    assert spec.training.eval_interval == 5
