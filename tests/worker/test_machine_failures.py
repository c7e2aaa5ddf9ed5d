"""A machine that fails while an adapter is verified fails no job: it goes back to the queue, and is verified elsewhere.

The worker, the database, the storage and the child are real; one thing in the child fails (run_failures.py).
"""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import OperationalError

from api.core.db.database import session_scope
from api.core.db.tables import Event, Job
from api.core.files.storage import get_storage
from api.core.models import catalogue
from api.core.settings import get_settings
from lorainit.config.spec import Hyperparameters, Lora
from tests.lorainit.conftest import chat
from tests.things import ON_ONE_DATABASE, a_file, a_project, a_queued_job
from tests.worker.conftest import Lab
from worker import gpu_health, tasks
from worker.job import artifacts, retry

pytestmark = [pytest.mark.usefixtures("service"), ON_ONE_DATABASE]
RECIPE = {
    "lora": Lora.model_validate({"init": "kaiming", "r": 2, "target_modules": ["q_proj"]})
    .resolve()[0]
    .model_dump(mode="json"),
    "training": Hyperparameters(max_steps=2, batch_size=4, learning_rate=1e-2).model_dump(mode="json"),
}
BEFORE_TRAINING, DOWNLOAD = 1, 2
Worker = Callable[..., Job]


@pytest.fixture
def worker(environment: pytest.MonkeyPatch, before_run: Callable[[str], None], tiny_base: Path) -> Worker:
    """A worker with one queued job, on a machine that fails so in that check; returns what became of the job."""
    gpu_health._of.cache_clear()
    settings = {"CATALOGUE": str(tiny_base / "catalogue.toml"), "RETRY_SECONDS": "0"}
    for name, value in settings.items():
        environment.setenv(f"LORAINIT_{name}", value)
    get_settings.cache_clear()
    catalogue.forget()
    rows = "".join(json.dumps(chat(f"What is {n}?", f"It is {n} and {n}")) + "\n" for n in range(8))
    with session_scope() as session:
        project = a_project(session)
        file = a_file(session, project, bytes=len(rows))
        get_storage().put(file.storage_key, iter([rows.encode()]))
        job_id = a_queued_job(session, project, file=file, model="tiny", recipe=RECIPE).id
        session.commit()

    def run(fails: str = "", check: int = 0) -> Job:
        before_run(f"from tests.worker import run_failures\nrun_failures.fail_in({check}, {fails!r})" if fails else "")
        tasks.run_job(job_id)
        with session_scope() as session:
            return session.get_one(Job, job_id)

    return run


def last_event(job: Job) -> str:
    query = select(Event.message).where(Event.job_id == job.id).order_by(Event.sequence.desc()).limit(1)
    with session_scope() as session:
        return session.scalars(query).one()


@pytest.mark.parametrize(
    ("fails", "told"),
    [
        ("CUDA", "The GPU failed while the run was using it: CUDA error: uncorrectable ECC error encountered"),
        pytest.param(
            "bus error",
            "The training process crashed (SIGBUS); a full /dev/shm is the usual cause (shm_size",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "shared memory",
            "There was no room left in /dev/shm, the memory that processes share (shm_size",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_machine_that_fails_while_the_download_is_checked_is_no_verdict_on_the_job(
    worker: Worker, fails: str, told: str
) -> None:
    job = worker(fails, DOWNLOAD)
    assert (job.status, job.lost_runs) == ("queued", 1), job.error
    assert last_event(job).startswith(told)
    assert last_event(job).endswith("while verifying; the job goes back to the queue")


def test_a_download_whose_check_crashed_is_checked_by_the_next_run(worker: Worker) -> None:
    assert worker("abort", DOWNLOAD).status == "queued"
    job = worker()
    assert job.status == "succeeded", job.error
    assert job.export_check["passed"]  # type: ignore[index]


def test_a_gpu_that_fails_in_the_check_before_the_first_step_is_no_verdict_either(worker: Worker) -> None:
    job = worker("CUDA", BEFORE_TRAINING)
    assert (job.status, job.lost_runs, job.trained_tokens) == ("queued", 1, None), job.error
    assert "while initializing" in last_event(job)


# --- a process that crashes, whenever that is: a script stands in the child's place ---------------


@pytest.mark.parametrize("name", ["SIGABRT", "SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE"])
def test_a_job_whose_process_crashes_goes_back_to_the_queue_and_is_counted(lab: Lab, name: str) -> None:
    lab.cancel(2)
    lab.cancel(3)
    lab.run(f"import signal; step(0, 1); time.sleep(0.2); os.kill(os.getpid(), signal.{name})")
    assert (lab.statuses()[0], lab.job(1).lost_runs) == ("queued", 1)
    assert f"The training process crashed ({name})" in lab.story(1)[-1]


def test_a_job_whose_process_a_library_ends_goes_back_to_the_queue_and_is_counted(lab: Lab) -> None:
    lab.cancel(2)
    lab.cancel(3)
    lab.run("step(0, 1); time.sleep(0.2); print('Error an illegal memory access', file=sys.stderr); os._exit(1)")
    assert (lab.statuses()[0], lab.job(1).lost_runs) == ("queued", 1)
    assert "The training process ended with exit code 1 and reported nothing" in lab.story(1)[-1]


def test_a_library_that_ends_the_process_for_want_of_memory_is_told_as_that(lab: Lab) -> None:
    lab.cancel(2)
    lab.cancel(3)
    lab.run("step(0, 1); print('Error out of memory at line 63 in file /src/ops.cu', file=sys.stderr); sys.exit(1)")
    assert (lab.statuses()[0], (lab.job(1).error or {})["code"]) == ("failed", "out_of_memory")


def test_a_job_whose_child_says_that_its_failure_may_pass_goes_on_from_its_checkpoint(lab: Lab) -> None:
    lab.cancel(2)
    lab.cancel(3)
    lab.run("failed(0, 'out_of_memory', may_pass=True); sys.exit(1)")
    assert (lab.statuses()[0], lab.job(1).lost_runs) == ("queued", 1)
    assert "out_of_memory of " in lab.story(1)[-1]


def test_a_job_whose_child_says_so_too_often_ends_with_the_code_that_it_said(lab: Lab) -> None:
    lab.cancel(2)
    lab.cancel(3)
    for _ in range(get_settings().max_attempts):
        lab.run("failed(0, 'out_of_memory', may_pass=True); sys.exit(1)")
        with session_scope() as session:
            session.execute(update(Job).values(not_before=None))
            session.commit()
    assert (lab.statuses()[0], (lab.job(1).error or {})["code"]) == ("failed", "out_of_memory")


def test_a_child_that_cannot_read_its_spec_is_no_fault_of_the_machine(lab: Lab) -> None:
    lab.cancel(2)
    lab.cancel(3)
    lab.run("sys.exit(2)")
    assert (lab.statuses()[0], (lab.job(1).error or {})["code"]) == ("failed", "internal_error")


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.EIO, errno.ESTALE])
def test_a_host_without_room_or_with_a_bad_disk_is_no_fault_of_the_jobs(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(tasks, "run_child", raising(OSError(number, os.strerror(number))))
    tasks.run_job("ftjob-x")
    assert lab.statuses() == ["queued"] * 3
    assert [lab.job(seed).lost_runs for seed in (1, 2, 3)] == [1, 1, 1]


def test_a_job_whose_processes_always_crash_fails_in_the_end_and_says_how(
    lab: Lab, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("LORAINIT_MAX_ATTEMPTS", "1")
    get_settings.cache_clear()
    lab.run("os.abort()")
    assert lab.statuses() == ["failed"] * 3
    error = lab.job(1).error or {}
    assert error["code"] == "worker_lost"
    assert "The training process crashed (SIGABRT) while loading" in str(error["message"])


def test_the_databases_full_shared_memory_is_no_full_disk(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """What PostgreSQL says of its own /dev/shm."""
    words = 'could not resize shared memory segment "/PostgreSQL.1" to 8388608 bytes: No space left on device'
    monkeypatch.setattr(artifacts, "store_result", raising(OperationalError("SELECT", {}, Exception(words))))
    monkeypatch.setattr(retry, "LONGEST_SECONDS", 0)
    lab.run("for i in range(3): done(i)")
    assert lab.statuses() == ["queued"] * 3
    assert "no room left in /dev/shm" in lab.story(1)[-1]


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail
