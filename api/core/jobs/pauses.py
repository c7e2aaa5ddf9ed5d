"""Pausing and resuming: the two status changes that a person makes before a job has ended. Nothing here commits.

A pause of a run is a request beside the status `running` (shown as `pausing`). The worker sees it when it
renews its lease, has the run write a checkpoint, and gives the job back; a job that was asked to pause is
left `paused` by whatever interrupts it. A pause does not change the fencing token, because the run still has to write
its checkpoint.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from api.core.db.database import now
from api.core.db.tables import FINAL_STATUSES, Checkpoint, File, Job, ShownJob
from api.core.errors import WrongState
from api.core.jobs import events
from api.core.jobs.transitions import Lease, change_status, job_with_status, lock_job, update_row
from api.core.queue import scheduling

# The cause is not in the request: the same request may well succeed when it is tried again.
RESUMABLE_ERRORS = (
    "worker_lost",
    "device_failed",
    "hub_unavailable",
    "out_of_memory",
    "disk_full",
    "internal_error",
    "quota_exceeded",
)
_PAUSABLE = ("validating_files", "queued")


@dataclass(frozen=True)
class Resumability:
    """Whether resuming a job would do something, from which step (None = from the start), and why not."""

    possible: bool
    from_step: int | None
    reason: str | None


def pause(session: Session, job: Job) -> Job:
    """A waiting job → `paused`; a run is asked to pause. Pausing twice changes nothing.

    Raises:
        WrongState: the job has ended.
    """
    row = lock_job(session, job)
    if row.status in FINAL_STATUSES:
        raise WrongState(f"Job {job.id} has already {_ended(row.status)}.", code="invalid_job_state")
    if row.status in _PAUSABLE:
        change_status(session, job_with_status(job.id, row.status), "paused", "The job is paused")
    elif row.status == "running" and not row.pause_requested:
        update_row(session, job_with_status(job.id, "running"), {"pause_requested": True})
        message = "Pause asked for: the run writes a checkpoint and frees the device"
        events.append_status_event(session, job.id, message, at=now(session), status="pausing", previous="running")
    session.refresh(job)
    return job


def is_pause_requested(session: Session, lease: Lease) -> bool:
    """Whether a pause of this run was requested."""
    return bool(session.scalar(select(Job.pause_requested).where(*lease.conditions())))


def resume(session: Session, job: Job, *, stop_after: float | None = None) -> Job:
    """`paused` or `failed` → `queued`, or `validating_files` if its files were never checked. Others stay as they are.

    Args:
        stop_after: where a job that was halted halts next; None = it goes to its end.

    Raises:
        WrongState: the job is still pausing, has ended for good, or would only fail again.
        QuotaExceeded: it has failed, and its project has as many waiting jobs as it may.
    """
    row = lock_job(session, job)
    session.refresh(job)
    if row.pause_requested:
        message = f"Job {job.id} is still pausing; resume it once it is paused."
        raise WrongState(message, code="invalid_job_state")
    if row.status in ("succeeded", "cancelled"):
        raise WrongState(f"Job {job.id} has already {_ended(row.status)}.", code="invalid_job_state")
    if row.status not in ("paused", "failed"):
        return job
    resumability = check_resumable(session, [job])[job.id]
    if not resumability.possible:
        raise WrongState(f"Job {job.id} cannot be resumed: {resumability.reason}.", code="job_not_resumable")
    if row.status == "failed":  # a paused job counts as waiting already
        scheduling.require_queue_quota(session, job.project_id)
    _requeue(session, job, resumability, stop_after)
    session.refresh(job)
    return job


def _requeue(session: Session, job: Job, resumability: Resumability, stop_after: float | None) -> None:
    where = "the start" if resumability.from_step is None else f"step {resumability.from_step}"
    here = job_with_status(job.id, job.status)
    if job.priority_time is None:
        change_status(session, here, "validating_files", "Job resumed: its files are checked first")
        return
    priority_time = scheduling.compute_priority_time(now(session))
    message = f"Job resumed: it goes on from {where}"
    # Whoever resumes a halted job by hand wants it to go on; its experiment gives it the next halt itself.
    change_status(
        session,
        here,
        "queued",
        message,
        priority_time=priority_time,
        lost_runs=0,
        not_before=None,
        halted_at=None,
        stop_after=job.stop_after if job.halted_at is None else stop_after,
    )


def check_resumable(session: Session, jobs: Iterable[ShownJob]) -> dict[str, Resumability]:
    """For each of these jobs, whether it can be resumed, in two queries for any number of jobs."""
    jobs = list(jobs)
    steps = _find_last_steps(session, [job.id for job in jobs if job.status in ("paused", "failed")])
    gone = _find_without_files(session, [job.id for job in jobs if job.status == "failed"])
    return {job.id: _check_resumable(job, steps.get(job.id), gone=job.id in gone) for job in jobs}


def _check_resumable(job: ShownJob, step: int | None, *, gone: bool) -> Resumability:
    if job.status == "paused":
        return Resumability(possible=True, from_step=step, reason=None)
    reason = _explain_not_resumable(job, step, gone=gone)
    return Resumability(possible=reason is None, from_step=step if reason is None else None, reason=reason)


def _explain_not_resumable(job: ShownJob, step: int | None, *, gone: bool) -> str | None:
    if job.status != "failed":
        return {
            "validating_files": "the job has not started",
            "queued": "the job has not started" if job.started_at is None else "the job is in the queue already",
            "running": "the job is pausing" if job.pause_requested else "the job is running",
            "succeeded": "the job has succeeded",
            "cancelled": "a cancelled job cannot be resumed",
        }[job.status]
    code = (job.error or {}).get("code")
    if code not in RESUMABLE_ERRORS:
        return f"the same job would fail again with {code}"
    if step is None:
        return "there is no checkpoint to go on from"
    return "a file it was trained on has been deleted" if gone else None


def _find_last_steps(session: Session, job_ids: list[str]) -> dict[str, int]:
    if not job_ids:
        return {}
    kept = (Checkpoint.job_id.in_(job_ids), Checkpoint.deleted_at.is_(None))
    last = func.max(Checkpoint.step).label("last")
    rows = session.execute(select(Checkpoint.job_id, last).where(*kept).group_by(Checkpoint.job_id))
    return {row.job_id: row.last for row in rows}


def _find_without_files(session: Session, job_ids: list[str]) -> set[str]:
    """Ended jobs of which a file was deleted. That is possible because files are only kept while a job is open."""
    if not job_ids:
        return set()
    named = File.id.in_([Job.training_file_id, Job.validation_file_id, Job.calibration_file_id])
    query = select(Job.id).join(File, named).where(Job.id.in_(job_ids), File.deleted_at.is_not(None))
    return set(session.scalars(query))


def _ended(status: str) -> str:
    return {"cancelled": "been cancelled"}.get(status, status)
