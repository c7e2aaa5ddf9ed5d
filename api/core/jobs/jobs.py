"""All changes of a job's status. `transitions` writes them. Pausing and resuming are in `pauses`.

    validating_files ─► queued ─► running ─► succeeded | failed
            │ ▲         │ ▲  ▲      │ │
            ▼ │         ▼ │  └──────┘ │  worker lost, worker draining, temporary failure
           paused ◄── paused ◄────────┘  a pause that was asked for
                  any state that is not final ─► cancelled;  failed ─► queued by resuming it

A claim takes a new fencing token (`lease_token` + 1) and a lease. Every write of a run
names its token. If no row is changed, another worker owns the job now and the run has to stop.
Functions take a session first and never commit.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from api.core.db.database import now
from api.core.db.tables import FINAL_STATUSES, Adapter, File, Job, has_status
from api.core.errors import WrongState
from api.core.jobs import events, labels
from api.core.jobs.transitions import Failure, Lease, change_status, job_with_status, lock_job, lock_row, update_row
from api.core.monitoring import counters
from api.core.queue import groups, scheduling
from api.core.settings import get_settings

__all__ = ["Failure", "Lease"]

LONGEST_WAIT_SECONDS = 300.0  # so that a job is tried soon after a long outage is over


def create(session: Session, job: Job) -> Job:
    """Insert a new job (status `validating_files`) with its first event and the rows of its metadata."""
    session.add(job)
    session.flush()  # because the event's and the metadata's rows refer to the job's
    labels.index(session, job)
    message = f"Created fine-tuning job: {job.id}"
    events.append_status_event(session, job.id, message, at=job.created_at, status="validating_files", previous=None)
    return job


def admit(
    session: Session, job_id: str, *, recipe: dict[str, Any], choices: list[Any], group_key: str | None = None
) -> bool:
    """`validating_files` → `queued`, with the recipe's autos resolved. False if it moved meanwhile."""
    moved = change_status(
        session,
        job_with_status(job_id, "validating_files"),
        "queued",
        "Files validated, moving job to queued state",
        recipe=recipe,
        choices=choices,
        group_key=group_key,
        priority_time=scheduling.compute_priority_time(now(session)),
    )
    return moved is not None


def reject(session: Session, job_id: str, failure: Failure) -> bool:
    """`validating_files` → `failed`: the files cannot be used."""
    waiting = job_with_status(job_id, "validating_files")
    return _fail(session, waiting, failure)


def claim(
    session: Session,
    owner: str,
    *,
    lease_seconds: float,
    group_size: int = 1,
    queues: Sequence[str] = (scheduling.DEFAULT_QUEUE,),
) -> list[Job]:
    """Claim the best job of these queues and, up to `group_size`, those that may be trained with it; best first.

    The message that woke the worker names a job, but which ones are taken is decided here. So the order of messages
    and duplicates do not matter. `owner` is a process that runs nothing else meanwhile.
    """
    at = now(session)
    until = at + timedelta(seconds=lease_seconds)
    chosen = groups.lock_next_group(session, size=group_size, queues=queues)
    for job_id in chosen:
        _start_run(
            session, job_id, owner, at=at, until=until, companions=[other for other in chosen if other != job_id]
        )
    return [session.get_one(Job, job_id, populate_existing=True) for job_id in chosen]


def _start_run(
    session: Session, job_id: str, owner: str, *, at: datetime, until: datetime, companions: list[str]
) -> None:
    together = f", trained together with {', '.join(companions)}" if companions else ""
    taken = change_status(
        session,
        job_with_status(job_id, "queued"),
        "running",
        f"Fine-tuning job started{together}",
        event_data={"worker": owner, "trained_with": companions},
        lease_token=Job.lease_token + 1,
        lease_owner=owner,
        lease_until=until,
        attempts=Job.attempts + 1,
        started_at=at,
        not_before=None,
        trained_with=companions,
    )
    assert taken is not None, "the row has been locked since it was chosen"


def renew_lease(session: Session, lease: Lease, *, lease_seconds: float) -> bool:
    """Renew the lease. False: the run does not own the job any more (cancelled, or another worker has it).

    That is how a worker learns of a cancel, so it needs no code for one.
    """
    return update_row(session, lease.conditions(), {"lease_until": now(session) + timedelta(seconds=lease_seconds)})


def update_run(session: Session, lease: Lease, **values: Any) -> bool:
    """Write columns that are no status (progress, plan, init_report ...) if the run still owns the job.

    Call it before any other write of a run, because the row's lock keeps other workers away until the commit.
    """
    return update_row(session, lease.conditions(), values or {"lease_token": lease.token})


def reset_lost_runs(session: Session, lease: Lease) -> bool:
    """As `update_run`, for a new checkpoint: the job made progress, so earlier lost runs no longer count."""
    return update_run(session, lease, lost_runs=0)


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
    warnings: Sequence[dict[str, Any]] = (),
) -> bool:
    """`running` → `succeeded`, with the adapter's rows. The bytes are in storage already, so no row is without them."""
    # Asked first, because a run that lost its job must not leave rows of files behind.
    if not update_run(session, lease):
        return False
    at = now(session)
    session.add_all(files)
    session.flush()
    adapter.created_at = at
    session.add(adapter)
    events.append(session, lease.job_id, f"New fine-tuned model created: {adapter.name}", at=at)
    moved = change_status(
        session,
        lease.conditions(),
        "succeeded",
        "The job has successfully completed",
        result_file_id=result_file_id,
        trained_tokens=trained_tokens,
        export_check=export_check,
        resources=resources,
        progress=progress,
        warnings=list(warnings),
    )
    return moved is not None


def fail(session: Session, lease: Lease, failure: Failure, **values: Any) -> bool:
    """`running` → `failed`. Such a job is not retried unless somebody resumes it."""
    return _fail(session, lease.conditions(), failure, **values)


def _fail(session: Session, conditions: list[Any], failure: Failure, **values: Any) -> bool:
    error = failure.as_json()
    message = f"The job failed: {failure.message}"
    moved = change_status(
        session, conditions, "failed", message, level="error", event_data={"error": error}, error=error, **values
    )
    return moved is not None


# --- interrupted: back to the queue, or paused if somebody asked for that meanwhile -----------------


def release(session: Session, lease: Lease, reason: str) -> bool:
    """`running` → `queued` or `paused` on purpose (a shutdown, a pause), so it does not count as an attempt."""
    return _requeue(session, lease, reason, attempts=Job.attempts - 1)


def halt(session: Session, lease: Lease, step: int) -> bool:
    """`running` → `paused`, because the run has reached the step at which it was to wait; not counted as an attempt."""
    message = f"Halted after step {step}: the experiment compares its jobs here"
    moved = change_status(session, lease.conditions(), "paused", message, attempts=Job.attempts - 1, halted_at=step)
    return moved is not None


def retry_alone(session: Session, lease: Lease, reason: str) -> bool:
    """`running` → `queued` for another attempt alone: `groups` starts no group with a job that has run before."""
    return _requeue(session, lease, reason, then="the job will be tried again alone", level="warn")


def requeue_lost_run(session: Session, lease: Lease, how: str, *, max_attempts: int, code: str = "worker_lost") -> bool:
    """A run ended for no fault of the job: `queued` again, or `failed` after `max_attempts` without progress.

    After the first lost run the job may start at once, because most failures are of one machine. From the second on the
    wait doubles each time.

    Args:
        how: what happened, as the start of a sentence.
        code: what the job fails with in the end.

    Returns:
        True when the job will be tried again.
    """
    row = lock_row(session, *lease.conditions())
    if row is None:
        return False
    lost_runs, what = row.lost_runs + 1, f"{how} while {(row.progress or {}).get('stage', 'loading')}"
    if lost_runs >= max_attempts:
        message = f"The job was lost {lost_runs} times without a new checkpoint. The last time: {what}."
        fail(session, lease, Failure(code, message), lost_runs=lost_runs)
        return False
    event_data, wait = {"losses": lost_runs}, now(session) + timedelta(seconds=_compute_backoff(lost_runs))
    return _requeue(session, lease, what, level="warn", event_data=event_data, lost_runs=lost_runs, not_before=wait)


def _compute_backoff(lost_runs: int) -> float:
    """Seconds before the next attempt: 0, then doubling from the setting on, five minutes at most."""
    # Bounded, because a large power of two overflows; the longest wait is reached long before.
    doublings = min(lost_runs - 2, 60)
    return 0.0 if lost_runs < 2 else min(LONGEST_WAIT_SECONDS, float(get_settings().retry_seconds * 2**doublings))


def find_expired_leases(session: Session) -> list[str]:
    """The ids of running jobs whose lease ran out: their worker died, or it cannot reach the database."""
    return list(session.scalars(select(Job.id).where(*_has_expired_lease(session))))


def recover_lost_runs(session: Session, *, max_attempts: int, among: Sequence[str] | None = None) -> list[str]:
    """Requeue running jobs whose lease ran out: see `requeue_lost_run`.

    Args:
        among: only these jobs; None = all.

    Returns:
        The ids of the jobs that will be tried again.
    """
    wanted = select(Job.id, Job.lease_token).where(*_has_expired_lease(session))
    if among is not None:
        wanted = wanted.where(Job.id.in_(among))
    # Locked rows are skipped, because their run or another reconciler is writing them: not lost, or recovered already.
    rows = session.execute(wanted.with_for_update(skip_locked=True)).all()
    leases = [Lease(row.id, row.lease_token) for row in rows]
    counters.add(session, "leases_lost", len(leases))
    return [
        one.job_id for one in leases if requeue_lost_run(session, one, "The worker was lost", max_attempts=max_attempts)
    ]


def _has_expired_lease(session: Session) -> tuple[ColumnElement[bool], ...]:
    return has_status(Job, "running"), Job.lease_until < now(session)


def _requeue(
    session: Session,
    lease: Lease,
    reason: str,
    *,
    then: str = "the job goes back to the queue",
    level: events.Level = "info",
    event_data: dict[str, Any] | None = None,
    **columns: Any,
) -> bool:
    # Locked before the choice of the status, because somebody may ask for a pause at the same moment.
    row = lock_row(session, *lease.conditions())
    if row is None:
        return False
    status = "paused" if row.pause_requested else "queued"
    message = f"{reason}; {'the job is paused' if row.pause_requested else then}"
    return (
        change_status(session, lease.conditions(), status, message, level=level, event_data=event_data, **columns)
        is not None
    )


def cancel(session: Session, job: Job) -> Job:
    """Any open state → `cancelled`, at once and for good: the new token fences the running worker.

    It is no request that the worker notices later, because the job could still succeed meanwhile (docs/decisions/0002).

    Cancelling a cancelled job changes nothing.

    Raises:
        WrongState: the job has already succeeded or failed.
    """
    row = lock_job(session, job)
    if row.status not in FINAL_STATUSES:
        cancel_open(session, job)
    elif row.status != "cancelled":
        raise WrongState(
            f"Job {job.id} has already {row.status}; it can no longer be cancelled.", code="invalid_job_state"
        )
    session.refresh(job)
    return job


def cancel_open(session: Session, job: Job, message: str = "The job was cancelled") -> None:
    """Cancel a job whose row is locked and that has not ended."""
    change_status(
        session, [Job.id == job.id, Job.finished_at.is_(None)], "cancelled", message, lease_token=Job.lease_token + 1
    )
