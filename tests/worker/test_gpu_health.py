"""A slot whose GPU has failed a run takes no job until that GPU computes again, and its jobs go back to the queue."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from api.core.db.database import now, session_scope
from api.core.devices import devices, examination
from api.core.maintenance import doctor
from api.core.queue import workers
from api.core.settings import get_settings
from lorainit.config.events import Failed
from tests.worker.conftest import Lab
from worker import app, gpu_health, tasks
from worker.child.supervisor import Outcome
from worker.host import scratch

pytestmark = pytest.mark.one_database
FAILS = "for i in range(len(members)): failed(i, 'device_failed')"
BROKEN = Failed(code="device_failed", message="The GPU failed.", param=None)


@pytest.fixture(autouse=True)
def _anew() -> None:
    gpu_health._of.cache_clear()


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """What the next looks at the GPU find; after them, that it computes."""
    found = list[str | None]()
    monkeypatch.setattr(gpu_health, "examine", lambda *_, **__: found.pop(0) if found else None)
    monkeypatch.setattr(gpu_health, "FIRST_WAIT", 0.0)
    return found


def test_a_job_whose_gpu_fails_is_tried_alone_then_again_and_fails_in_the_end(
    lab: Lab, looks: list[str | None], environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("LORAINIT_MAX_ATTEMPTS", "2")
    environment.setenv("LORAINIT_RETRY_SECONDS", "0")
    get_settings.cache_clear()
    lab.run(FAILS)
    assert lab.statuses() == ["queued"] * 3
    assert "lost its GPU" in lab.story(1)[-1]
    lab.run(FAILS)
    assert lab.statuses() == ["queued"] * 3
    assert lab.story(1)[-1] == "device_failed of 1 while loading; the job goes back to the queue"
    for _ in range(5):
        lab.run(FAILS)
    assert lab.statuses() == ["failed"] * 3
    assert lab.job(1).error["code"] == "device_failed"  # type: ignore[index]


def test_the_slot_rests_until_its_gpu_computes(
    lab: Lab, looks: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    flag, seen = app.unhealthy_file(os.getppid(), 0), list[str]()
    answers = iter(["No CUDA GPUs are available", None])

    def look(*_: object, **__: object) -> str | None:
        seen.append(flag.read_text())
        return next(answers)

    monkeypatch.setattr(gpu_health, "examine", look)
    lab.run(FAILS)
    assert seen == ["device_failed of 3.", "No CUDA GPUs are available"]
    assert not flag.exists()
    lab.run("for i in range(len(members)): step(i, 1); done(i)")
    assert "succeeded" in lab.statuses()


def test_each_failure_in_a_row_is_waited_for_twice_as_long() -> None:
    assert [gpu_health._wait_seconds(failures) for failures in (1, 2, 3, 4)] == [0.0, 60.0, 120.0, 240.0]
    assert gpu_health._wait_seconds(10_000) == 3600.0


def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found = list[float]()
    monkeypatch.setattr(gpu_health, "_sleep", lambda seconds, _leaving: bool(found.append(seconds)))
    monkeypatch.setattr(gpu_health, "examine", lambda *_, **__: None)
    return found


def test_a_run_that_ends_otherwise_begins_the_count_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A GPU that computes for the look and fails each run is given fewer and fewer."""
    waited, health = waits(monkeypatch), gpu_health.GpuHealth()
    for is_broken in (True, True, False, True):
        if is_broken:
            health.note_event(BROKEN)
        health.wait_until_healthy(None, tmp_path / "flag", is_leaving=lambda: False)
    assert waited == [0.0, 60.0, 0.0]


@pytest.mark.parametrize(("names", "looked"), [([], 0), (["0", "1"], 1)])
def test_a_process_that_fell_silent_has_its_gpus_looked_at_where_it_had_any(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, names: list[str], looked: int
) -> None:
    monkeypatch.setattr(gpu_health.devices, "list_gpus", lambda: names)
    waited, health = waits(monkeypatch), gpu_health.GpuHealth()
    health.note_event(Failed(code="worker_lost", message="Silence.", param=None))
    health.wait_until_healthy(None, tmp_path / "flag", is_leaving=lambda: False)
    assert len(waited) == looked


@pytest.mark.parametrize("end", ["os.abort()", "done(0); os._exit(1)"])
@pytest.mark.parametrize(("names", "looked"), [([], 0), (["0"], 1)])
def test_after_a_crash_the_slot_looks_at_its_gpu_before_it_takes_the_next_job(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, names: list[str], looked: int, end: str
) -> None:
    """bitsandbytes leaves with exit code 1 where CUDA answers one of its kernels with an error."""
    found = list[list[str]]()
    monkeypatch.setattr(gpu_health.devices, "list_gpus", lambda: names)
    monkeypatch.setattr(gpu_health, "examine", lambda *_, **__: found.append(lab.statuses()))
    lab.run(end)
    assert found == [["queued" if end == "os.abort()" else "succeeded", "queued", "queued"]] * looked


def test_a_run_that_fails_with_a_word_is_stopped_or_is_killed_says_nothing_of_its_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_health.devices, "list_gpus", lambda: ["0"])
    waited, health = waits(monkeypatch), gpu_health.GpuHealth()
    for returncode, stopped in ((-signal.SIGABRT, True), (-signal.SIGKILL, False), (1, False)):
        if returncode == 1:
            health.note_event(Failed(code="non_finite_loss", message="NaN.", param=None))
        health.note_end(Outcome(returncode, stopped=stopped, stderr_tail=""), members=1)
        health.wait_until_healthy(None, tmp_path / "flag", is_leaving=lambda: False)
    assert not waited


def test_a_worker_that_leaves_waits_for_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    health = gpu_health.GpuHealth()
    health.note_event(BROKEN)
    monkeypatch.setattr(examination, "PROGRAM", ("no such program",))
    health.wait_until_healthy(None, tmp_path / "flag", is_leaving=lambda: True)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ('print(\'{"machine": {"gpu_trouble": null}}\')', None),
        ('print(\'{"machine": {"gpu_trouble": "It is too old."}}\')', "It is too old."),
        ("import os, json; print(json.dumps({'machine': {'gpu_trouble': os.environ['CUDA_VISIBLE_DEVICES']}}))", "7"),
        ("import sys; sys.exit('It fell over.')", "It fell over."),
        (
            "import time; time.sleep(600)",
            "The examination of this machine has not ended after 2 seconds; a GPU may hang.",
        ),
    ],
)
def test_a_gpu_is_looked_at_by_a_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch, script: str, expected: str | None
) -> None:
    monkeypatch.setattr(examination, "PROGRAM", (sys.executable, "-c", script))
    monkeypatch.setattr(examination, "ANSWER_SECONDS", 2.0 if "sleep" in script else 300.0)
    assert gpu_health.examine("7", is_leaving=lambda: False) == expected


@pytest.fixture
def slots(environment: pytest.MonkeyPatch) -> Callable[[int], None]:
    def set_to(count: int) -> None:
        environment.setenv("LORAINIT_WORKER_SLOTS", str(count))
        get_settings.cache_clear()

    return set_to


@pytest.mark.usefixtures("service")
def test_only_the_slot_whose_gpu_failed_is_missing_from_its_workers_row(slots: Callable[[int], None]) -> None:
    slots(3)
    assert app._count_usable_slots() == (3, None)
    with scratch.raised_flag(app.unhealthy_file(os.getpid(), 1), "The GPU failed."):
        assert app._count_usable_slots() == (2, "The GPU failed.")
        with scratch.raised_flag(app.unhealthy_file(os.getpid(), 2), "The GPU failed."):
            assert app._count_usable_slots() == (1, "The GPU failed.")
    assert app._count_usable_slots() == (3, None)


@pytest.mark.usefixtures("service")
def test_a_worker_that_takes_no_job_at_all_says_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "find_problem", lambda _slots: "The NVIDIA driver is old.")
    assert app._count_usable_slots() == (0, "The NVIDIA driver is old.")


@pytest.mark.usefixtures("service")
def test_the_doctor_tells_why_a_living_worker_takes_no_job() -> None:
    def check() -> doctor.Check:
        return next(check for check in doctor.examine() if check.name == "workers")

    def say(trouble: str | None) -> None:
        with session_scope() as session:
            at = now(session)
            workers.record_heartbeat(session, "here:1", slots=1, queues=["train"], started_at=at, problem=trouble)
            session.commit()

    say("The GPU failed.")
    assert (check().status, check().message) == ("failed", "here:1 takes no job, or not in all slots: The GPU failed.")
    say(None)
    assert (check().status, check().message) == ("ok", "1 online")


def test_a_run_that_hangs_is_tried_again_and_its_gpu_is_looked_at(
    lab: Lab, environment: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = list[str | None]()
    environment.setenv("LORAINIT_SILENCE_SECONDS", "1")
    get_settings.cache_clear()
    monkeypatch.setattr(tasks, "LATER", 0.0)
    monkeypatch.setattr(devices, "list_gpus", lambda: ["0"])
    monkeypatch.setattr(tasks, "_gpus", lambda: "0")
    monkeypatch.setattr(gpu_health, "examine", lambda names, **_: looked.append(names))
    lab.run("os.kill(os.getpid(), 19)")
    assert lab.statuses() == ["queued"] * 3
    assert "did nothing for too long (LORAINIT_SILENCE_SECONDS)" in lab.story(1)[-1]
    assert looked == ["0"]


def test_a_slot_rests_while_a_process_of_its_run_cannot_be_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flag, health, seen = tmp_path / "flag", gpu_health.GpuHealth(), list[str]()
    process = psutil.Popen([sys.executable, "-c", "import time; time.sleep(600)"])

    def wait(_seconds: float, _is_leaving: Callable[[], bool]) -> bool:
        seen.append(flag.read_text())
        if len(seen) == 2:
            process.kill()
            process.wait(10)
        return False

    monkeypatch.setattr(gpu_health, "_sleep", wait)
    monkeypatch.setattr(gpu_health, "examine", lambda *_, **__: None)
    health.note_end(Outcome(-9, stopped=True, stderr_tail="", stuck=psutil.Process(process.pid)), members=1)
    health.wait_until_healthy(None, flag, is_leaving=lambda: False)
    assert len(seen) == 2
    assert f"Process {process.pid} of a run has been killed and does not end" in seen[1]


def test_a_run_whose_end_nobody_told_says_nothing_of_the_next_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    health = gpu_health.GpuHealth()
    monkeypatch.setattr(devices, "list_gpus", lambda: ["0"])
    waited = waits(monkeypatch)
    health.note_start()
    health.note_event(Failed(code="internal_error", message="", param=None))  # and then its supervision failed
    health.note_start()
    health.note_end(Outcome(1, stopped=False, stderr_tail=""), members=1)
    health.wait_until_healthy(None, tmp_path / "flag", is_leaving=lambda: False)
    assert len(waited) == 1
