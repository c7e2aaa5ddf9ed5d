"""A run that is asked to stop leaves a checkpoint of that moment, and goes on from it to the very same end."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from lorainit.config.errors import HaltReached, Stopped
from lorainit.config.events import Checkpoint, Done, Halted, Metrics, Stage, Tick
from lorainit.context import RunRequest
from lorainit.run import run, run_together
from lorainit.train.adapter_trainer import find_halt
from tests.lorainit.conftest import only_training

pytestmark = pytest.mark.usefixtures("training_only")

FAR = {"max_steps": 4, "batch_size": 5, "checkpoint_interval": 100, "eval_interval": 2}


def stopping(spec, out, when):
    """Run until `when(event, events so far)` holds; the checkpoints that were told."""
    events = []

    def listen(event):
        if isinstance(event, Tick | Stage) and when(event, events):
            raise Stopped("asked")
        events.append(event)

    with pytest.raises(Stopped):
        run(spec, out, listen)
    return [event for event in events if isinstance(event, Checkpoint)]


def steps_of(events):
    return [event.step for event in events if isinstance(event, Metrics)]


def in_step(number):
    """The first tick of a step that is not finished then."""
    return lambda event, past: isinstance(event, Tick) and max(steps_of(past), default=0) == number - 1


def while_evaluating_after(number):
    """In the evaluation that follows a step, which is not logged yet."""

    def holds(event, past):
        stages = [one.stage for one in past if isinstance(one, Stage)]
        return (
            isinstance(event, Tick) and stages[-1:] == ["evaluating"] and max(steps_of(past), default=0) == number - 1
        )

    return holds


def log_of(folder: Path):
    kept = ("step", "train_loss", "grad_norm", "learning_rate", "full_valid_loss", "tokens")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{name: json.loads(line)[name] for name in kept} for line in lines]


@pytest.fixture(scope="module")
def whole(spec, rows):
    return spec(data={"validation": str(rows)}, training=FAR, micro_batch_size=2)


@pytest.fixture(scope="module")
def straight(whole, tmp_path_factory):
    """The folder of the run that nobody stopped."""
    folder = tmp_path_factory.mktemp("straight")
    with only_training():
        run(whole, folder, lambda _: None)
    return folder


@pytest.mark.parametrize(
    ("when", "at"),
    [
        (in_step(2), 1),
        pytest.param(in_step(4), 3, marks=pytest.mark.slow),
        (while_evaluating_after(2), 2),
        (while_evaluating_after(4), 4),
    ],
    ids=["in step 2", "in step 4", "evaluating after step 2", "evaluating after the last step"],
)
def test_stopped_and_resumed_run_is_the_run_that_was_never_stopped(whole, straight, tmp_path, when, at):
    (left,) = stopping(whole, tmp_path / "stopped", when)
    assert left.step == at
    resumed = run(whole.model_copy(update={"resume_from": left.path}), tmp_path / "resumed", lambda _: None)
    name = "adapter_model.safetensors"
    assert (Path(resumed.adapter) / name).read_bytes() == (straight / "adapter" / name).read_bytes()
    assert log_of(tmp_path / "resumed") == log_of(straight)


def test_stop_before_the_first_step_is_over_leaves_nothing(spec, tmp_path):
    assert stopping(spec(training=FAR), tmp_path, in_step(1)) == []


def test_stop_right_after_resuming_writes_no_second_checkpoint(spec, tmp_path):
    one = spec(training=FAR)
    (left,) = stopping(one, tmp_path / "1", in_step(3))
    again = one.model_copy(update={"resume_from": left.path})
    assert stopping(again, tmp_path / "2", lambda event, _: isinstance(event, Tick)) == []


def test_every_member_of_a_group_is_saved(spec, tmp_path):
    told = {0: [], 1: []}

    def listener(who):
        def listen(event):
            if isinstance(event, Tick) and len(steps_of(told[1])) == 2:
                raise Stopped("asked")
            told[who].append(event)

        return listen

    requests = [RunRequest(spec(training=FAR, seed=who), tmp_path / str(who), listener(who)) for who in told]
    with pytest.raises(Stopped):
        list(run_together(requests))
    assert [[e.step for e in events if isinstance(e, Checkpoint)] for events in told.values()] == [[2], [2]]
    assert all(earlier <= later for earlier, later in pairwise(steps_of(told[0])))
    assert not any(isinstance(event, Done) for events in told.values() for event in events)


def halting(spec, out):
    """Run until the run halts by itself; its events."""
    events = []
    with pytest.raises(HaltReached):
        run(spec, out, events.append)
    return events


def test_a_run_that_halts_at_its_share_evaluates_there_and_goes_on_to_the_very_same_end(whole, straight, tmp_path):
    events = halting(whole.model_copy(update={"stop_after": 0.6}), tmp_path / "halted")
    (left,) = [event for event in events if isinstance(event, Checkpoint)]
    assert events[-1] == Halted(step=3) and left.step == 3
    assert [event.step for event in events if isinstance(event, Metrics) and event.full_valid_loss][-1] == 3
    resumed = run(whole.model_copy(update={"resume_from": left.path}), tmp_path / "resumed", lambda _: None)
    name = "adapter_model.safetensors"
    assert (Path(resumed.adapter) / name).read_bytes() == (straight / "adapter" / name).read_bytes()


def test_a_resumed_run_does_not_halt_at_a_share_that_it_has_passed(whole, tmp_path):
    events = halting(whole.model_copy(update={"stop_after": 0.6}), tmp_path / "halted")
    (left,) = [event for event in events if isinstance(event, Checkpoint)]
    again = whole.model_copy(update={"resume_from": left.path, "stop_after": 0.6})
    assert isinstance(run(again, tmp_path / "resumed", lambda _: None), Done)


def test_one_run_of_a_group_halts_and_the_other_goes_on(whole, tmp_path):
    specs = [whole.model_copy(update={"stop_after": 0.5}), whole.model_copy(update={"seed": 1})]
    requests = [RunRequest(one, tmp_path / str(who), lambda _: None) for who, one in enumerate(specs)]
    ends = dict(run_together(requests))
    assert isinstance(ends[0], HaltReached) and isinstance(ends[1], Done)


@pytest.mark.parametrize(
    ("share", "total", "warmup", "step"),
    [(None, 100, 3, None), (0.1, 100, 3, 10), (0.1, 100, 20, 21), (0.99, 100, 3, 99), (0.9, 2, 1, None)],
)
def test_a_run_halts_behind_its_warm_up_and_before_its_end(share, total, warmup, step):
    assert find_halt(share, total=total, warmup=warmup) == step
