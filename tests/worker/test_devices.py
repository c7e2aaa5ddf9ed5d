"""A worker's slots share out its GPUs, and it takes no job that would land on the wrong device."""

import pytest

from api.core.settings import Settings
from lorainit import gpus
from tests.worker.conftest import Lab
from worker import devices


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What this worker sees; a test may add to it."""
    names = list[str]()
    monkeypatch.setattr(gpus, "visible", lambda: names)
    monkeypatch.setattr(gpus, "trouble", lambda: None)
    return names


@pytest.mark.parametrize(
    ("names", "slots", "sets"),
    [
        (["2", "3"], 2, ["2", "3"]),
        (["0", "1", "2", "3"], 2, ["0,1", "2,3"]),
        (["0", "1", "2"], 2, ["0", "1"]),
        (["MIG-a", "MIG-b"], 2, ["MIG-a", "MIG-b"]),
        (["0", "1"], 1, [None]),
        ([], 2, [None, None]),
    ],
)
def test_each_slot_has_gpus_of_its_own(seen: list[str], names: list[str], slots: int, sets: list[str | None]) -> None:
    seen += names
    assert [devices.of_slot(slot, slots) for slot in range(slots)] == sets


def test_more_slots_than_gpus_take_no_job(seen: list[str]) -> None:
    assert devices.may_take_a_job(4), "slots of a machine without GPUs share its processor"
    seen += ["2", "3"]
    assert devices.may_take_a_job(2)
    assert not devices.may_take_a_job(4)


def test_a_slot_has_as_many_gpus_as_a_job_may_ask_for(seen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "get_settings", lambda: Settings(devices_per_job=2))
    assert devices.may_take_a_job(2), "processes of a machine without GPUs share its processor"
    seen += ["0", "1", "2", "3"]
    assert devices.may_take_a_job(2)
    assert not devices.may_take_a_job(4)
    assert "LORAINIT_DEVICES_PER_JOB" in str(devices.trouble(4))


def test_a_worker_whose_gpu_cannot_be_used_leaves_the_job_in_the_queue(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "trouble", lambda: "The NVIDIA driver is old.")
    lab.run("until(lambda: held(0)); step(0, 1); done(0)")
    assert lab.statuses() == ["queued"] * 3
