"""The life of a job. Every status change is a compare-and-set in this file and nowhere else.

    validating_files ─► queued ─► running ─► succeeded | failed
            │             ▲         │
            ▼             └─────────┘ lost worker, drained worker
          failed        any state that is not final ─► cancelled

A claim takes a new fencing token (`lease_token` + 1) and a lease. Whoever writes for a run says
which token it holds; zero rows changed means somebody else owns the job now: stop politely.
Functions take a session first and never commit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import CursorResult, select, update
from sqlalchemy.orm import Session

from api.core import events, groups, tallies
from api.core.db import now
from api.core.errors import WrongState
from api.core.models import FINAL_STATUSES, Adapter, File, Job

_UNHELD: dict[str, None] = {"lease_until": None, "lease_owner": None}


@dataclass(frozen=True)
class Lease:
    """The right to write for one run of a job."""

    job_id: str
    token: int


@dataclass(frozen=True)
class Failure:
    """Why a job failed: a code from the closed list, a sentence, and the field it is about."""

    code: str
    message: str
    param: str | None = None

    def as_json(self) -> dict[str, str | None]:
        """The object shown as `job.error`."""
        return {"code": self.code, "message": self.message, "param": self.param}


def create(session: Session, job: Job) -> Job:
    """Insert a new job (status `validating_files`) with its first event."""
    session.add(job)
    session.flush()
    events.status_event(
        session,
        job.id,
        f"Created fine-tuning job: {job.id}",
        at=job.created_at,
        status="validating_files",
        previous=None,
    )
    return job


def admit(
    session: Session, job_id: str, *, recipe: dict[str, Any], choices: list[Any], group_key: str | None = None
) -> bool:
    """`validating_files` → `queued`, with the recipe's autos resolved. False if it moved meanwhile."""
    at = now(session)
    columns = {"recipe": recipe, "choices": choices, "group_key": group_key}
    moved = _move(session, job_id, "validating_files", status="queued", **columns)
    if moved:
        message = "Files validated, moving job to queued state"
        events.status_event(session, job_id, message, at=at, status="queued", previous="validating_files")
    return moved


def reject(session: Session, job_id: str, failure: Failure) -> bool:
    """`validating_files` → `failed`: the files cannot be used."""
    at = now(session)
    moved = _move(session, job_id, "validating_files", status="failed", finished_at=at, error=failure.as_json())
    if moved:
        _failed_event(session, job_id, failure, at=at, previous="validating_files")
    return moved


def claim(session: Session, owner: str, *, lease_seconds: float, group_size: int = 1) -> list[Job]:
    """Take the best queued job and, up to `group_size`, those that may be trained with it; best first.

    The message that woke us names a job; which ones we take is decided here, so order and duplicates
    of messages do not matter. `owner` is a process that runs nothing else meanwhile.
    """
    at = now(session)
    until = at + timedelta(seconds=lease_seconds)
    chosen = groups.next_up(session, size=group_size)
    taken = [job_id for job_id in chosen if _take(session, job_id, owner, at=at, until=until)]
    for job_id in taken:
        _started(session, job_id, owner, at=at, fellows=[other for other in taken if other != job_id])
    return [session.get_one(Job, job_id, populate_existing=True) for job_id in taken]


def _take(session: Session, job_id: str, owner: str, *, at: datetime, until: datetime) -> bool:
    return _move(
        session,
        job_id,
        "queued",
        status="running",
        lease_token=Job.lease_token + 1,
        lease_owner=owner,
        lease_until=until,
        attempts=Job.attempts + 1,
        started_at=at,
    )


def _started(session: Session, job_id: str, owner: str, *, at: datetime, fellows: list[str]) -> None:
    _change(session, [Job.id == job_id], {"trained_with": fellows})
    together = f", trained together with {', '.join(fellows)}" if fellows else ""
    message, told = f"Fine-tuning job started{together}", {"worker": owner, "trained_with": fellows}
    payload = {"kind": "status", "status": "running", "previous": "queued", **told}
    events.append(session, job_id, message, at=at, data=payload)


def beat(session: Session, lease: Lease, *, lease_seconds: float) -> bool:
    """Renew the lease. False = the job is not ours any more (cancelled, or lost and taken over)."""
    return _write(session, lease, lease_until=now(session) + timedelta(seconds=lease_seconds))


def note(session: Session, lease: Lease, **values: Any) -> bool:
    """Write columns that are no status (progress, plan, init_report ...) if the job is still ours.

    Called before any other write of a run: the row's lock keeps the job ours until the commit.
    """
    return _write(session, lease, **values or {"lease_token": lease.token})


def succeed(
    session: Session,
    lease: Lease,
    *,
    adapter: Adapter,
    files: Sequence[File],
    result_file_id: str | None,
    trained_tokens: int,
    export_check: dict[str, Any],
    resources: dict[str, Any],
    progress: dict[str, Any],
) -> bool:
    """`running` → `succeeded`, with the adapter's rows. The bytes are in storage already."""
    at = now(session)
    session.add_all(files)
    session.flush()
    moved = _write(
        session,
        lease,
        status="succeeded",
        finished_at=at,
        **_UNHELD,
        result_file_id=result_file_id,
        trained_tokens=trained_tokens,
        export_check=export_check,
        resources=resources,
        progress=progress,
    )
    if moved:
        adapter.created_at = at
        session.add(adapter)
        events.append(session, lease.job_id, f"New fine-tuned model created: {adapter.name}", at=at)
        message = "The job has successfully completed"
        events.status_event(session, lease.job_id, message, at=at, status="succeeded", previous="running")
    return moved


def fail(session: Session, lease: Lease, failure: Failure, **values: Any) -> bool:
    """`running` → `failed`. Such a job is never retried by itself."""
    at = now(session)
    moved = _write(
        session,
        lease,
        status="failed",
        finished_at=at,
        **_UNHELD,
        error=failure.as_json(),
        **values,
    )
    if moved:
        _failed_event(session, lease.job_id, failure, at=at, previous="running")
    return moved


def give_back(session: Session, lease: Lease, reason: str) -> bool:
    """`running` → `queued` on purpose (the worker shuts down); costs the job no attempt."""
    return _requeue(session, lease, reason, columns={"attempts": Job.attempts - 1})


def retry(session: Session, lease: Lease, reason: str) -> bool:
    """`running` → `queued` for another attempt, which is never shared with other jobs."""
    return _requeue(session, lease, reason, level="warn")


def cancel(session: Session, job: Job) -> Job:
    """Any open state → `cancelled`, at once and for good: the new token fences the running worker.

    Cancelling a cancelled job changes nothing.

    Raises:
        WrongState: the job has already succeeded or failed.
    """
    at = now(session)
    previous = session.scalar(select(Job.status).where(Job.id == job.id).with_for_update())
    if previous not in FINAL_STATUSES:
        assert previous is not None
        _move(
            session,
            job.id,
            previous,
            status="cancelled",
            finished_at=at,
            lease_token=Job.lease_token + 1,
            **_UNHELD,
        )
        message = "The job was cancelled"
        events.status_event(session, job.id, message, at=at, status="cancelled", previous=previous)
    elif previous != "cancelled":
        raise WrongState(
            f"Job {job.id} has already {previous}; it can no longer be cancelled.", code="invalid_job_state"
        )
    session.refresh(job)
    return job


def recover_lost(session: Session, *, max_attempts: int) -> list[str]:
    """Running jobs whose lease ran out → `queued`, or `failed` when the attempts are used up.

    Returns:
        The ids of the jobs that went back to the queue.
    """
    at = now(session)
    lost = session.scalars(
        select(Job).where(Job.status == "running", Job.lease_until < at).with_for_update(skip_locked=True)
    ).all()
    back = [job.id for job in lost if _recover(session, job, max_attempts=max_attempts)]
    tallies.add(session, "leases_lost", len(lost))
    return back


def _recover(session: Session, job: Job, *, max_attempts: int) -> bool:
    lease = Lease(job.id, job.lease_token)
    stage = (job.progress or {}).get("stage", "loading")
    if job.attempts >= max_attempts:
        message = f"The worker was lost {job.attempts} times; the last one while {stage}."
        fail(session, lease, Failure("worker_lost", message))
        return False
    reason = f"The worker was lost while {stage}; the job goes back to the queue"
    return _requeue(session, lease, reason, level="warn", attempt=job.attempts)


def _requeue(
    session: Session,
    lease: Lease,
    reason: str,
    *,
    level: events.Level = "info",
    columns: dict[str, Any] | None = None,
    **data: Any,
) -> bool:
    at = now(session)
    moved = _write(session, lease, status="queued", rung_at=None, **_UNHELD, **(columns or {}))
    if moved:
        events.status_event(
            session, lease.job_id, reason, at=at, status="queued", previous="running", level=level, **data
        )
    return moved


def _failed_event(session: Session, job_id: str, failure: Failure, *, at: datetime, previous: str) -> None:
    events.status_event(
        session,
        job_id,
        f"The job failed: {failure.message}",
        at=at,
        status="failed",
        previous=previous,
        level="error",
        error=failure.as_json(),
    )


def _move(session: Session, job_id: str, expected: str, **values: Any) -> bool:
    return _change(session, [Job.id == job_id, Job.status == expected], values)


def _write(session: Session, lease: Lease, **values: Any) -> bool:
    mine = [Job.id == lease.job_id, Job.status == "running", Job.lease_token == lease.token]
    return _change(session, mine, values)


def _change(session: Session, conditions: list[Any], values: dict[str, Any]) -> bool:
    statement = update(Job).where(*conditions).values(**values).execution_options(synchronize_session=False)
    result = session.execute(statement)
    assert isinstance(result, CursorResult)
    return result.rowcount == 1
