"""One run from start to end: claim, prepare, supervise, store, finish. It has one job, or several in a group.

message ─► claim (a token and a lease for each job) ─► files into scratch folders ─► one child process
         ─► each job's events become its rows ─► its adapter goes to storage ─► one transaction: succeeded
"""

import os
from collections.abc import Sequence
from concurrent.futures import wait
from contextlib import ExitStack

from billiard.process import current_process
from sqlalchemy.exc import OperationalError
from structlog.contextvars import bound_contextvars

from api.core import traces
from api.core.db.database import session_scope
from api.core.db.tables import Job
from api.core.devices import devices
from api.core.jobs import jobs
from api.core.logs import get_logger
from api.core.queue import queue
from api.core.settings import get_settings
from lorainit.config.events import Event
from lorainit.system.watchdog import Watchdog
from worker import gpu_health
from worker.app import app, drain_file, get_worker_name, unhealthy_file
from worker.child import warm
from worker.child.supervisor import RunPaths, StopReason, run_child
from worker.host import disk_space
from worker.job.job_writer import JobWriter

LATER = 60.0  # seconds for a silent run on several devices to end itself first, because its own error says more

log = get_logger(__name__)


@app.task(name=queue.TASK)  # type: ignore[untyped-decorator]
def run_job(job_id: str) -> None:
    """A message came: claim the best queued job, if there is one, and those that may be trained with it."""
    traces.get_provider()  # called first, so that a wrong configuration fails before a job is taken
    try:
        claimed = _claim()
    except OperationalError as error:
        log.warning("no job could be claimed; the reconciler notifies again", error=str(error))
        return
    if not claimed:
        log.info("nothing to do", notified_for=job_id)
        return
    with bound_contextvars(jobs=[job.id for job in claimed]), ExitStack() as exits:
        for job in claimed:
            exits.enter_context(traces.span("run", job.traceparent, job=job.id, attempt=job.attempts))
        writers = [exits.enter_context(JobWriter(job)) for job in claimed]
        wait([writer.prepare() for writer in writers])
        ready = {writer: writer.paths for writer in writers if writer.paths is not None}
        if ready:
            _train(list(ready), list(ready.values()))
    # After the writers have closed, because a lease must not be held while the GPU is examined.
    gpu_health.get_slot_health().wait_until_healthy(
        _gpus(), unhealthy_file(os.getppid(), _slot()), is_leaving=_is_leaving
    )


def _claim() -> list[Job]:
    settings, owner = get_settings(), f"{get_worker_name(os.getppid())}/{os.getpid()}"
    if not devices.may_take_a_job(settings.worker_slots) or not disk_space.has_space_for_any_job():
        return []  # the reconciler notifies again while a slot is free
    with session_scope() as session:
        claimed = jobs.claim(
            session,
            owner,
            lease_seconds=settings.lease_seconds,
            group_size=settings.group_size,
            queues=devices.list_served_queues(),
        )
        session.commit()
    return claimed


def _train(writers: Sequence[JobWriter], run_paths: Sequence[RunPaths]) -> None:
    settings = get_settings()
    watchdog = Watchdog(settings.silence_seconds, extra=LATER)
    gpu_health.get_slot_health().note_start()

    def on_event(event: Event) -> None:
        watchdog.reset(event)
        gpu_health.get_slot_health().note_event(event)
        writers[event.member].write_event(event)

    def should_stop() -> StopReason:
        if all(writer.is_over for writer in writers) and any(writer.is_lost for writer in writers):
            return "lost"
        if watchdog.is_overdue():  # because a GPU or its driver hangs
            return "hangs"
        pausing = any(writer.is_pausing and not writer.is_over for writer in writers)
        return "drain" if pausing or _is_leaving() else ""

    try:
        outcome = run_child(
            run_paths,
            grace=settings.stop_grace_seconds,
            on_event=on_event,
            should_stop=should_stop,
            warm=warm.get_warm_process(),
            gpus=_gpus(),
        )
    except Exception as error:
        log.exception("the worker failed")
        wait([writer.abort(error) for writer in writers])
        return
    gpu_health.get_slot_health().note_end(outcome, members=len(writers))
    if outcome.returncode and not outcome.stopped:
        log.error("the run ended badly", returncode=outcome.returncode, stderr=outcome.stderr_tail)
    # A pause of one job stops the process of all. The others are requeued with a checkpoint, too.
    reason = "The worker is shutting down" if _is_leaving() else "The run was stopped for a pause"
    wait([writer.finish(outcome, reason) for writer in writers])


def _slot() -> int:
    return int(getattr(current_process(), "index", 0))


def _gpus() -> str | None:
    return devices.find_gpus_of_slot(_slot(), get_settings().worker_slots)


def _is_leaving() -> bool:
    return drain_file(os.getppid()).exists()
