"""One job, start to end: claim, prepare, supervise, store, finish.

doorbell ─► claim (token + 1, lease) ─► files into a scratch folder ─► child process
         ─► its events become rows ─► its adapter goes to storage ─► one transaction: succeeded
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import structlog
from billiard.process import current_process

from api.core import jobs, metrics, queue
from api.core.db import session_scope
from api.core.jobs import Failure, Lease
from api.core.logs import get_logger
from api.core.models import Job
from api.core.settings import get_settings
from api.core.storage import get_storage
from lorainit.events import Checkpoint, Done, Event
from worker import artifacts
from worker.app import app, drain_file, name
from worker.lease import LeaseKeeper
from worker.patience import patiently
from worker.progress import Lost, Recorder
from worker.supervisor import Outcome, run_child

log = get_logger(__name__)


@app.task(name=queue.TASK)  # type: ignore[untyped-decorator]
def run_job(job_id: str) -> None:
    """Somebody rang: take the best queued job, if there is one, and see it through."""
    settings = get_settings()
    with session_scope() as session:
        job = jobs.claim(session, name(os.getppid()), lease_seconds=settings.lease_seconds)
        session.commit()
    if job is None:
        log.info("nothing to do", rung_for=job_id)
        return
    lease = Lease(job.id, job.lease_token)
    with structlog.contextvars.bound_contextvars(job_id=job.id, token=lease.token), _scratch(lease) as folder:
        log.info("claimed", attempt=job.attempts)
        lease_file = folder / "lease"
        with LeaseKeeper(lease, lease_file, seconds=settings.lease_seconds, beat=settings.beat_seconds) as keeper:
            try:
                _run(job, lease, folder, keeper)
            except Lost:
                log.warning("the job is not ours any more; stopped")
            except Exception:
                log.exception("the worker failed")
                _fail(lease, Failure("internal_error", "The worker failed while handling this job; see its log."))


def _run(job: Job, lease: Lease, folder: Path, keeper: LeaseKeeper) -> None:
    settings, recorder, storage = get_settings(), Recorder(lease), get_storage()
    spec = patiently(lambda: artifacts.prepare(job, folder, storage), until=keeper.lost)

    def on_event(event: Event) -> None:
        recorder.take(event)
        if recorder.is_due or isinstance(event, Checkpoint):
            patiently(recorder.flush, until=keeper.lost)
        if isinstance(event, Checkpoint):
            # After its metrics: a resumed run never has a checkpoint ahead of its metrics.
            patiently(lambda: artifacts.store_checkpoint(job, lease, event, folder, storage), until=keeper.lost)

    def should_stop() -> Literal["", "drain", "lost"]:
        if keeper.lost.is_set():
            return "lost"
        return "drain" if drain_file(os.getppid()).exists() else ""

    outcome = run_child(
        spec,
        folder / "out",
        lease_file=folder / "lease",
        grace=settings.stop_grace_seconds,
        on_event=on_event,
        should_stop=should_stop,
        device=_device(settings.worker_slots),
    )
    patiently(recorder.flush, until=keeper.lost)
    patiently(lambda: _finish(job, lease, folder, outcome, recorder.progress), until=keeper.lost)


def _finish(job: Job, lease: Lease, folder: Path, outcome: Outcome, progress: dict[str, Any]) -> None:
    if isinstance(outcome.end, Done):
        artifacts.store_result(job, lease, outcome.end, folder, get_storage(), progress)
        log.info("succeeded")
    elif outcome.end is not None:
        log.error("the run failed", code=outcome.end.code, message=outcome.end.message, stderr=outcome.stderr_tail)
        _fail(lease, Failure(outcome.end.code, outcome.end.message, outcome.end.param))
    elif outcome.stopped:
        with session_scope() as session:
            if jobs.give_back(session, lease, "The worker is shutting down; the job goes back to the queue"):
                log.info("given back")
            session.commit()
    else:
        log.error("the run died", returncode=outcome.returncode, stderr=outcome.stderr_tail)
        _fail(lease, _death(outcome.returncode))


def _device(slots: int) -> str | None:
    """The GPU of this slot when a worker has several; None leaves the environment as it is."""
    if slots == 1:
        return None
    slot = int(getattr(current_process(), "index", 0))
    visible = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
    return visible[slot] if slot < len(visible) else str(slot)


def _death(returncode: int) -> Failure:
    if returncode == -9:
        return Failure(
            "out_of_memory",
            "The training process was killed (signal 9), which is what the system does when memory runs out. "
            "Try a smaller max_length or batch, or a smaller model.",
        )
    return Failure("internal_error", f"The training process ended with exit code {returncode} and no word.")


def _fail(lease: Lease, failure: Failure) -> None:
    with session_scope() as session:
        job = session.get_one(Job, lease.job_id)
        file = metrics.store_csv(session, get_storage(), job)
        session.rollback()  # the upload is done; nothing was written yet
        if file is not None:
            session.add(file)
            session.flush()
        if jobs.fail(session, lease, failure, result_file_id=file.id if file else None):
            session.commit()


@contextmanager
def _scratch(lease: Lease) -> Iterator[Path]:
    folder = get_settings().scratch() / lease.job_id / f"attempt-{lease.token}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # another attempt's folder may lie beside it
            folder.parent.rmdir()
