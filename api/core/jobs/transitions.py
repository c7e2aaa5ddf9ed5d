"""The only place that changes a job's status: a compare-and-set on status and fencing token, and its event.

A compare-and-set, because web processes, workers and reconcilers change jobs at the same time. Whoever changes no row
has come too late and writes nothing else.

`api.core.jobs.jobs` and `api.core.jobs.pauses` give the changes their names. What every status implies for other
columns (the lease, the end, whether workers are to be notified) is written here, once. Nothing here commits.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, CursorResult, Row, case, literal, select, update
from sqlalchemy.orm import Session

from api.core.db.database import UTCDateTime, now
from api.core.db.tables import FINAL_STATUSES, Job, shown_status
from api.core.errors import NotFound
from api.core.jobs import events

_NO_LEASE: dict[str, Any] = {"lease_until": None, "lease_owner": None, "pause_requested": False}


@dataclass(frozen=True)
class Lease:
    """The right to write for one run of a job. The token is part of it, because the same worker may get a job twice."""

    job_id: str
    token: int

    def conditions(self) -> list[ColumnElement[bool]]:
        """True of the job's row as long as this lease holds."""
        return [Job.id == self.job_id, Job.status == "running", Job.lease_token == self.token]


@dataclass(frozen=True)
class Failure:
    """Why a job failed: a code from the closed list, a sentence, and the field it is about."""

    code: str
    message: str
    param: str | None = None

    def as_json(self) -> dict[str, str | None]:
        """The object shown as `job.error`."""
        return {"code": self.code, "message": self.message, "param": self.param}


def lock_row(session: Session, *conditions: ColumnElement[bool]) -> Row[tuple[str, bool, int, Any]] | None:
    """Status, pause request, lost runs and progress of one job, locked; None if it does not meet the conditions."""
    columns = select(Job.status, Job.pause_requested, Job.lost_runs, Job.progress)
    return session.execute(columns.where(*conditions).with_for_update()).one_or_none()


def lock_job(session: Session, job: Job) -> Row[tuple[str, bool, int, Any]]:
    """As `lock_row`, for a job that was found a moment ago.

    Raises:
        NotFound: it has been removed meanwhile.
    """
    row = lock_row(session, Job.id == job.id)
    if row is None:
        raise unknown_job(job.id)
    return row


def unknown_job(job_id: str) -> NotFound:
    """The error for a job that does not exist."""
    return NotFound(f"Could not find fine tune: {job_id}", code="fine_tune_not_found", param="fine_tune_id")


def job_with_status(job_id: str, status: str) -> list[ColumnElement[bool]]:
    """True of the job's row while it has that status."""
    return [Job.id == job_id, Job.status == status]


def change_status(
    session: Session,
    conditions: list[ColumnElement[bool]],
    status: str,
    message: str,
    *,
    level: events.Level = "info",
    event_data: dict[str, Any] | None = None,
    **columns: Any,
) -> str | None:
    """Change the status of the job that meets `conditions` and append the event; None if no job meets them any more.

    Returns:
        The job's id.
    """
    # The row is locked before it is changed, because the event names its previous status.
    found = session.execute(select(Job.id, Job.status, Job.pause_requested).where(*conditions).with_for_update())
    job = found.one_or_none()
    values = {**_implied_columns(status, now(session)), **columns}
    if values.get("result_file_id") is not None:  # the run has stored the CSV, so nobody else has to
        values["csv_due"] = None
    if job is None or not update_row(session, conditions, values):
        return None
    previous, at = shown_status(job.status, job.pause_requested), now(session)
    events.append_status_event(
        session, job.id, message, at=at, status=status, previous=previous, level=level, **(event_data or {})
    )
    return str(job.id)


def _implied_columns(status: str, at: datetime) -> dict[str, Any]:
    """The columns that follow from a status. The error of a failed job is given by the caller."""
    ended = at if status in FINAL_STATUSES else None  # a failed job that is resumed has no end any more
    implied: dict[str, Any] = {"status": status, "finished_at": ended, "error": None, "csv_due": None}
    implied["experiment_due"] = case((Job.experiment_id.is_not(None), literal(at, UTCDateTime)))
    if ended is not None:
        implied["csv_due"] = case((Job.result_file_id.is_(None), literal(ended, UTCDateTime)))
    if status == "queued":
        implied["notified_at"] = None  # so that workers are notified of it again
    return implied if status == "running" else {**implied, **_NO_LEASE}


def update_row(session: Session, conditions: list[ColumnElement[bool]], values: dict[str, Any]) -> bool:
    """Write columns of the one job that meets `conditions`; False if none does."""
    statement = update(Job).where(*conditions).values(**values).execution_options(synchronize_session=False)
    result = session.execute(statement)
    assert isinstance(result, CursorResult)
    return result.rowcount == 1
