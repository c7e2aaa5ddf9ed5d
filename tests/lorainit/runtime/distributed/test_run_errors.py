"""Three runs of one process, of which the first is done before the others: its end, good or bad, is its own."""

import errno
import gc
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorainit.config.errors import LorainitError, OutOfMemory, Stopped
from lorainit.config.events import Checkpoint, Done, Message, Metrics, Stage
from lorainit.context import RunRequest
from lorainit.export import outputs
from lorainit.model import base as base_module
from lorainit.run import run, run_together
from lorainit.runtime import devices
from lorainit.train import adapter_trainer

pytestmark = pytest.mark.usefixtures("training_only")

FIRST, OTHERS = 0, (1, 2)


def alike(spec, **more):
    """Three specs; the first has one step, the others three."""
    steps = [1, 3, 3]
    return [
        spec(
            "wide-llama",
            **{"lora": {"init": "kaiming", "r": 2}, "seed": who, "micro_batch_size": 5, **more},
            training={"max_steps": steps[who], "batch_size": 5, "checkpoint_interval": 100},
        )
        for who in range(3)
    ]


def together(specs, folder, heard=None):
    """How each ended, and what was said: (who, event) in order."""
    said = []

    def listener(who):
        def listen(event):
            if heard:
                heard(who, event)
            said.append((who, event))

        return listen

    requests = [RunRequest(spec, folder / str(who), listener(who)) for who, spec in enumerate(specs)]
    return dict(run_together(requests)), said


def factors(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def put_off(said):
    return [who for who, event in said if isinstance(event, Message) and event.data.get("put_off")]


@pytest.fixture
def no_room(monkeypatch):
    """The device has room for nothing beside what lies there."""
    monkeypatch.setattr(devices, "free_bytes", lambda device: 1000)


@pytest.fixture
def bases_alive(monkeypatch):
    """Of each base that is loaded: how many others lay in memory then."""
    alive, counts, load_model = weakref.WeakSet(), [], base_module.load_model

    def loaded(*args, **named):
        gc.collect()
        counts.append(sum(1 for model in alive if next(model.parameters()).numel()))
        alive.add(model := load_model(*args, **named))
        return model

    monkeypatch.setattr(base_module, "load_model", loaded)
    return counts


def breaking(module, name, error, monkeypatch, *, when):
    """The function raises where `when(*args)` holds."""
    works = getattr(module, name)

    def broken(*args, **named):
        if when(*args):
            raise error
        return works(*args, **named)

    monkeypatch.setattr(module, name, broken)


def of_the_first(job, *_rest):
    return job.spec.seed == FIRST


MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
BUG = RuntimeError("expected m1 and m2 to have the same dtype")
STAGES = {
    "its checkpoint": (adapter_trainer, "write", BUG, lambda folder, *_: "/0/" in str(folder), "internal_error"),
    "writing it": (outputs, "write_manifest", BUG, of_the_first, "internal_error"),
    "no space": (outputs, "write_metrics", OSError(28, "full", "x"), lambda out: out.name == "0", "disk_full"),
    "observing it": (outputs, "observe_adapter", MEMORY, of_the_first, "out_of_memory"),
    "verifying it": (outputs, "verify", BUG, of_the_first, "internal_error"),
    "its last word": (outputs, "measure_resources", BUG, of_the_first, "internal_error"),
}


# The manifest is written beside the metrics, and a look that finds no memory ends a run below as well.
SLOW = ("writing it", "observing it")


@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=pytest.mark.slow) if stage in SLOW else stage for stage in STAGES]
)
def test_whatever_goes_wrong_at_the_end_of_one_ends_that_one_only(spec, tmp_path, monkeypatch, capfd, stage):
    module, name, error, when, code = STAGES[stage]
    breaking(module, name, error, monkeypatch, when=when)
    ends, said = together(alike(spec), tmp_path)
    assert isinstance(ends[FIRST], LorainitError)
    assert ends[FIRST].code == code
    assert ("expected m1 and m2" in capfd.readouterr().err) == (error is BUG), "the operator learns what it was"
    assert not list((tmp_path / "0").glob(".adapter*"))
    assert (tmp_path / "0" / "adapter").exists() == (stage == "its last word"), "which comes after it was compared"
    for who in OTHERS:
        assert isinstance(ends[who], Done)
        assert [event.step for one, event in said if one == who and isinstance(event, Metrics)] == [1, 2, 3]


def test_an_evaluation_that_runs_out_of_memory_ends_its_own_run_only(spec, tmp_path, monkeypatch, rows):
    from lorainit.train import loop

    def when(_slots, its_trainer, *_):
        return its_trainer.run.spec.seed == FIRST and its_trainer.step == 1

    breaking(loop, "evaluate", MEMORY, monkeypatch, when=when)
    ends, _ = together(alike(spec, data={"validation": str(rows)}), tmp_path)
    assert isinstance(ends[FIRST], OutOfMemory)
    assert all(isinstance(ends[who], Done) for who in OTHERS)


def test_one_whose_initialization_runs_out_of_memory_ends_before_the_others_train(spec, tmp_path, monkeypatch):
    breaking(__import__("lorainit.init.stage", fromlist=["start"]), "start", MEMORY, monkeypatch, when=of_the_first)
    ends, said = together(alike(spec), tmp_path)
    assert isinstance(ends[FIRST], OutOfMemory)
    assert all(isinstance(ends[who], Done) for who in OTHERS)
    assert not [event for who, event in said if who == FIRST and isinstance(event, Metrics)]


@pytest.mark.usefixtures("no_room")
def test_without_room_for_a_second_base_one_is_verified_when_the_others_are_done(spec, tmp_path, bases_alive):
    ends, said = together(alike(spec), tmp_path)
    assert put_off(said) == [FIRST]
    order = [(who, type(event)) for who, event in said]
    last_step = max(n for n, one in enumerate(order) if one == (1, Metrics))
    assert order.index((FIRST, Checkpoint)) < last_step < order.index((FIRST, Done))
    assert all(ends[who].export_check["passed"] for who in ends)
    assert max(bases_alive) == 0, "never two of them"
    assert not list((tmp_path / "0").glob(".adapter*"))


def test_a_verification_that_runs_out_of_memory_after_all_is_put_off(spec, tmp_path, monkeypatch):
    tried = []

    def once(job, *_):
        tried.append(job)
        return len(tried) == 1

    breaking(outputs, "_compare", MEMORY, monkeypatch, when=once)
    ends, said = together(alike(spec), tmp_path)
    assert put_off(said) == [FIRST]
    assert all(ends[who].export_check["passed"] for who in ends)


def test_those_who_end_together_are_verified_one_after_the_other_on_one_base(spec, tmp_path, bases_alive):
    specs = [one.model_copy(update={"training": alike(spec)[1].training}) for one in alike(spec)]
    ends, said = together(specs, tmp_path)
    assert all(ends[who].export_check["passed"] for who in ends)
    assert not put_off(said)
    assert max(bases_alive) == 0


@pytest.mark.usefixtures("no_room")
def test_one_that_failed_keeps_no_part_of_the_base_in_memory(spec, tmp_path, monkeypatch, bases_alive):
    breaking(outputs, "observe_adapter", MEMORY, monkeypatch, when=of_the_first)
    ends, _ = together(alike(spec), tmp_path)
    assert isinstance(ends[FIRST], OutOfMemory)
    assert max(bases_alive) == 0


class Killed(BaseException):
    """As when the process dies."""


@pytest.mark.usefixtures("no_room")
def test_a_crash_while_a_verification_is_put_off_resumes_to_the_verification(spec, tmp_path):
    specs = alike(spec)

    def kill(who, event):
        if who == 1 and isinstance(event, Metrics) and event.step == 2:
            raise Killed

    said = []
    with pytest.raises(Killed):
        together(specs, tmp_path / "crashed", lambda who, event: (said.append((who, event)), kill(who, event)))
    assert put_off(said) == [FIRST]
    (point,) = [event for who, event in said if who == FIRST and isinstance(event, Checkpoint)]
    again, straight = [], run(specs[FIRST], tmp_path / "straight", lambda event: None)
    done = run(specs[FIRST].model_copy(update={"resume_from": point.path}), tmp_path / "again", again.append)
    assert not [event for event in again if isinstance(event, Metrics)], "no step is taken again"
    assert [event.stage for event in again if isinstance(event, Stage)][-2:] == ["exporting", "verifying"]
    assert done.export_check["passed"]
    assert same(factors(done.adapter), factors(straight.adapter))


def test_a_stop_while_one_is_verified_leaves_the_others_a_checkpoint(spec, tmp_path):
    def stop(who, event):
        if who == FIRST and isinstance(event, Stage) and event.stage == "verifying":
            raise Stopped("asked")

    said = []
    with pytest.raises(Stopped):
        together(alike(spec), tmp_path, lambda who, event: (said.append((who, event)), stop(who, event)))
    steps = {who: [e.step for one, e in said if one == who and isinstance(e, Checkpoint)] for who in range(3)}
    assert steps == {0: [1], 1: [1], 2: [1]}


@pytest.mark.parametrize("which", [1, *(pytest.param(which, marks=pytest.mark.slow) for which in (0, 2))])
def test_at_a_stop_one_whose_checkpoint_cannot_be_written_keeps_no_other_from_its_own(
    spec, tmp_path, monkeypatch, which
):
    save = adapter_trainer.AdapterTrainer.save

    def breaks(self):
        if self.run.spec.seed == which:
            raise OSError(errno.EIO, "the disk")
        save(self)

    def stop(who, event):
        if isinstance(event, Metrics) and who == 2 and event.step == 1:
            raise Stopped("asked")

    monkeypatch.setattr(adapter_trainer.AdapterTrainer, "save", breaks)
    specs = [
        one.model_copy(update={"training": one.training.model_copy(update={"max_steps": 3})}) for one in alike(spec)
    ]
    said = []
    with pytest.raises(Stopped):
        together(specs, tmp_path, lambda who, event: (said.append((who, event)), stop(who, event)))
    assert {who for who, event in said if isinstance(event, Checkpoint)} == {0, 1, 2} - {which}
    (warning,) = (
        event.message for who, event in said if isinstance(event, Message) and "No checkpoint" in event.message
    )
    assert warning.startswith("No checkpoint could be written at the stop: ")


@pytest.mark.parametrize("which", [1, *(pytest.param(which, marks=pytest.mark.slow) for which in (0, 2))])
def test_one_whose_optimizer_cannot_be_made_ends_before_the_others_train(spec, tmp_path, monkeypatch, which):
    make = adapter_trainer.make_optimizer
    made = iter(range(3))

    def fails(recipe, layers):
        if next(made) == which:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return make(recipe, layers)

    monkeypatch.setattr(adapter_trainer, "make_optimizer", fails)
    ends, _ = together(alike(spec), tmp_path)
    assert isinstance(ends[which], OutOfMemory)
    assert all(isinstance(end, Done) for who, end in ends.items() if who != which)


def test_a_listener_that_breaks_down_ends_everything_as_itself(spec, tmp_path):
    def broken(who, event):
        if who == FIRST and isinstance(event, Metrics):
            raise BrokenPipeError("nobody listens")

    with pytest.raises(BrokenPipeError, match="nobody listens"):
        together(alike(spec), tmp_path, broken)
