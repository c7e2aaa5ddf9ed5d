"""A worker's slots share out its GPUs, and it takes no job that would land on the wrong device."""

from collections.abc import Callable
from time import sleep
from types import SimpleNamespace

import pytest

from api.core.devices import devices, run_environment
from api.core.settings import get_settings
from lorainit.system import driver, gpus
from tests.conftest import forget
from tests.worker.conftest import Lab

NO_GPU = "this machine shows no NVIDIA GPU"
Set = Callable[..., None]


@pytest.fixture
def seen(environment: pytest.MonkeyPatch) -> list[str]:
    """What this worker sees; a test may add to it before the worker decides what it uses."""
    names = list[str]()
    environment.setattr(gpus, "list_visible", lambda: names)
    environment.setattr(gpus, "find_problem", lambda: None)
    environment.setattr(gpus, "may_be_used", lambda: True)
    environment.setattr(gpus, "explain_no_gpu", lambda: None if names else NO_GPU)
    environment.setattr(driver, "list_gpus", lambda: None)
    return names


@pytest.fixture
def set_to(environment: pytest.MonkeyPatch) -> Set:
    """Give settings other values; the worker decides anew."""

    def give(**settings: str) -> None:
        for name, value in settings.items():
            environment.setenv(f"LORAINIT_{name.upper()}", value)
        forget()

    return give


@pytest.mark.parametrize(
    ("names", "slots", "sets"),
    [
        (["2", "3"], 2, ["2", "3"]),
        (["0", "1", "2", "3"], 2, ["0,1", "2,3"]),
        (["0", "1", "2"], 2, ["0", "1"]),
        (["MIG-a", "MIG-b"], 2, ["MIG-a", "MIG-b"]),
        (["0", "1"], 1, [None]),
        ([], 2, ["", ""]),
    ],
)
def test_each_slot_has_gpus_of_its_own(seen: list[str], names: list[str], slots: int, sets: list[str | None]) -> None:
    seen += names
    assert [devices.find_gpus_of_slot(slot, slots) for slot in range(slots)] == sets


def test_more_slots_than_gpus_take_no_job(seen: list[str]) -> None:
    seen += ["2", "3"]
    assert devices.may_take_a_job(2)
    assert not devices.may_take_a_job(4)


def test_slots_of_a_machine_without_gpus_share_its_processor(seen: list[str], set_to: Set) -> None:
    set_to(devices_per_job="2")
    assert devices.may_take_a_job(4)


def test_a_slot_has_as_many_gpus_as_a_job_may_ask_for(seen: list[str], set_to: Set) -> None:
    set_to(devices_per_job="2")
    seen += ["0", "1", "2", "3"]
    assert devices.may_take_a_job(2)
    assert not devices.may_take_a_job(4)
    assert "LORAINIT_DEVICES_PER_JOB" in str(devices.find_problem(4))


def test_a_job_for_several_devices_finds_them_in_no_divided_gpu(seen: list[str], set_to: Set) -> None:
    """CUDA lets a process use one instance of a divided GPU."""
    seen += ["MIG-1", "MIG-2"]
    assert devices.may_take_a_job(1)
    set_to(devices_per_job="2")
    assert "(MIG)" in str(devices.find_problem(1))


@pytest.mark.parametrize(
    ("named", "is_refused"), [(["0", "1"], True), (["GPU-aa", "GPU-bb"], True), (["GPU-bb", "GPU-cc"], False)]
)
def test_a_divided_gpu_is_noticed_under_any_name(
    seen: list[str], set_to: Set, monkeypatch: pytest.MonkeyPatch, named: list[str], is_refused: bool
) -> None:
    listed = [driver.Gpu("GPU-aa", ("MIG-1", "MIG-2")), driver.Gpu("GPU-bb", ()), driver.Gpu("GPU-cc", ())]
    set_to(devices_per_job="2")
    monkeypatch.setattr(driver, "list_gpus", lambda: listed)
    seen += named
    assert ("(MIG)" in str(devices.find_problem(1))) == is_refused


@pytest.mark.parametrize(
    ("names", "wanted", "used"),
    [
        ([], "auto", "cpu"),
        (["0"], "auto", "gpu"),
        (["0"], "cpu", "cpu"),
        ([], "gpu", "gpu"),
    ],
)
def test_the_setting_says_what_is_used_and_auto_is_gpus_where_there_are_any(
    seen: list[str], set_to: Set, names: list[str], wanted: str, used: str
) -> None:
    seen += names
    set_to(worker_device=wanted)
    assert devices.device() == used


def test_a_worker_for_gpus_takes_no_job_without_one(seen: list[str], set_to: Set) -> None:
    set_to(worker_device="gpu")
    assert devices.find_problem(1) == f"LORAINIT_WORKER_DEVICE is gpu, and {NO_GPU}."


def test_a_worker_whose_gpu_goes_away_does_not_go_on_with_the_processor(seen: list[str]) -> None:
    seen.append("0")
    assert devices.find_problem(1) is None
    seen.clear()
    assert devices.find_problem(1) == f"This worker began with GPUs, and now {NO_GPU}."


def test_a_worker_for_the_processor_hides_the_gpus_from_its_runs(seen: list[str], set_to: Set) -> None:
    seen.append("0")
    set_to(worker_device="cpu")
    assert (devices.list_gpus(), devices.find_gpus_of_slot(0, 1), devices.find_problem(8)) == ([], "", None)


@pytest.mark.parametrize(("names", "needed"), [(["0"], "1"), ([], None)])
def test_a_run_of_a_worker_with_gpus_is_told_that_it_needs_one(
    seen: list[str], names: list[str], needed: str | None
) -> None:
    seen += names
    assert run_environment.make_run_environment("0").get(gpus.NEEDED) == needed


@pytest.mark.parametrize(("names", "left"), [([], ("train", "cpu")), (["0"], ("train", "gpu"))])
def test_jobs_that_ask_for_the_other_device_are_not_taken(
    seen: list[str], set_to: Set, names: list[str], left: tuple[str, ...]
) -> None:
    seen += names
    set_to(worker_queues="train,gpu,cpu")
    assert devices.list_served_queues() == left


def test_a_worker_of_which_no_job_may_be_taken_says_so(seen: list[str], set_to: Set) -> None:
    set_to(worker_queues="gpu")
    assert "names gpu alone, and this worker uses the processor" in str(devices.find_problem(1))


def test_an_identity_that_the_driver_does_not_list_is_told(seen: list[str], environment: pytest.MonkeyPatch) -> None:
    environment.setattr(driver, "list_gpus", lambda: [driver.Gpu("GPU-8932f937", ())])
    seen += ["GPU-8932", "GPU-dead"]
    assert devices.find_problem(2) == "CUDA_VISIBLE_DEVICES names GPU-dead, and the driver lists GPU-8932f937."


def test_a_driver_that_hangs_is_the_reason_until_it_answers(seen: list[str], environment: pytest.MonkeyPatch) -> None:
    clock, asked = [1000.0], list[float]()

    def hang() -> None:
        asked.append(clock[0])
        raise driver.DriverSilent("It hangs.")

    environment.setattr(devices, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    environment.setattr(driver, "list_gpus", hang)
    assert (devices.device(), devices.find_problem(1), devices.find_problem(1), asked) == (
        "gpu",
        *["It hangs."] * 2,
        [1000.0],
    )
    seen.append("0")
    environment.setattr(driver, "list_gpus", lambda: None)
    assert devices.find_problem(1) == "It hangs.", "it is asked again after a minute"
    clock[0] += devices.AGAIN_SECONDS
    while devices.find_problem(1):  # it is asked beside the worker's own work
        sleep(0.05)


def test_a_worker_whose_gpu_cannot_be_used_leaves_the_job_in_the_queue(
    lab: Lab, seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen.append("0")
    monkeypatch.setattr(gpus, "find_problem", lambda: "The NVIDIA driver is old.")
    lab.run("until(lambda: held(0)); step(0, 1); done(0)")
    assert lab.statuses() == ["queued"] * 3


def test_a_job_that_asks_for_a_gpu_stays_in_the_queue_of_a_worker_without_one(
    lab: Lab, seen: list[str], set_to: Set
) -> None:
    set_to(worker_queues="train,gpu")
    lab.move(2, "gpu")
    for _ in range(3):
        lab.run("for i in range(len(members)): step(i, 1); done(i)")
    assert get_settings().queues() == ("train", "gpu")
    assert lab.statuses() == ["succeeded", "queued", "succeeded"]
