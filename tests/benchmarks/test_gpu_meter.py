"""What a step of `make gpu-day` is measured by, where torch only pretends that there is a GPU."""

import contextlib
import types
import warnings

import pytest
import torch

from benchmarks.gpu.day import Day
from benchmarks.gpu.meter import WARM, Meter
from benchmarks.gpu.rivals import Metered


@pytest.fixture
def asked(monkeypatch):
    """What torch is asked of the GPU, in order."""
    said = []
    for name, answer in {"synchronize": None, "reset_peak_memory_stats": None, "max_memory_allocated": 3 << 30}.items():
        monkeypatch.setattr(torch.cuda, name, lambda n=name, a=answer: said.append(n) or a)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: said.append(mode))
    kinds = {"kernel": ("CUDA", "gemm"), "copy": ("CUDA", "Memcpy HtoD"), "host": ("CPU", "aten::mm")}
    events = [types.SimpleNamespace(device_type=types.SimpleNamespace(name=a), name=b) for a, b in kinds.values()]
    profile = contextlib.nullcontext(types.SimpleNamespace(events=lambda: events))
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: profile)
    return said


@pytest.fixture
def meter(tmp_path):
    return Meter(Day.begun("cuda", folder=tmp_path, tiny=True, seconds=60))


def step():
    warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)


def cells(meter):
    return meter.cells(tokens=10, operations=1.0).split(" | ")


@pytest.mark.filterwarnings("ignore:called a synchronizing:UserWarning")
def test_kernels_memory_and_waits_of_a_step_are_told(asked, meter):
    for _ in range(meter.steps):
        with meter.step():
            step()
    *_, kernels, _, peak, waits = cells(meter)
    assert (kernels, peak, waits) == ("1", "3.0", "1 |")


@pytest.mark.filterwarnings("ignore:called a synchronizing:UserWarning")
def test_a_trainers_callback_measures_as_many_steps_and_the_last_is_ended(asked, meter):
    callback = Metered(meter)
    callback.on_train_begin()
    for _ in range(meter.steps):
        step()
        callback.on_step_end()
    assert meter.done == meter.steps
    assert len(meter.seconds) == meter.timed
    assert asked.count("warn") == asked.count("default") == 1


def test_our_own_waiting_for_the_device_is_not_counted_as_the_steps(asked, meter):
    for _ in range(meter.steps):
        with meter.step():
            pass
    before, after = asked.index("warn"), asked.index("default")
    assert asked[before + 1 : after] == []


def test_memory_of_the_steps_that_warm_up_is_not_counted(asked, meter):
    for _ in range(WARM):
        with meter.step():
            pass
    assert "reset_peak_memory_stats" not in asked
    with meter.step():
        pass
    assert asked.count("reset_peak_memory_stats") == 1


def test_a_trainer_that_ends_too_early_is_an_error_and_not_a_figure(asked, meter):
    with meter.step():
        pass
    with pytest.raises(RuntimeError, match="1 steps were made of the 8 that were to be measured"):
        meter.cells(tokens=10, operations=1.0)
