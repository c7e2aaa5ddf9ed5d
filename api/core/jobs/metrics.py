"""A run's numbers, one row per optimizer step, and the CSV made of them."""

import hashlib
import io
import tempfile
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from api.core.db.database import now
from api.core.db.tables import File, Job, Metric
from api.core.files.storage import Storage
from api.core.ids import new_id
from api.core.jobs.transitions import update_row
from lorainit.config.results import write_csv


def save_steps(
    session: Session, job_id: str, token: int, steps: Sequence[tuple[int, dict[str, Any]]], *, at: datetime
) -> None:
    """Insert or complete the rows of these steps; an evaluation adds its numbers to the step's row.

    All steps take one query and one statement, because a run may report thousands of steps a second. A step may occur
    more than once.
    """
    numbers = sorted({step for step, _ in steps})
    if not numbers:
        return
    merged = _find_own_steps(session, job_id, token, first=numbers[0], last=numbers[-1])
    for step, values in steps:
        known = merged.setdefault(step, {})
        known.update({name: value for name, value in values.items() if value is not None or name not in known})
    same = {"job_id": job_id, "lease_token": token, "created_at": at}
    dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
    statement = dialect.insert(Metric)
    new = {name: statement.excluded[name] for name in ("lease_token", "created_at", "values")}
    upsert = statement.on_conflict_do_update(index_elements=["job_id", "step"], set_=new)
    session.execute(upsert, [{**same, "step": step, "values": merged[step]} for step in numbers])


def _find_own_steps(session: Session, job_id: str, token: int, *, first: int, last: int) -> dict[int, dict[str, Any]]:
    """The numbers that this attempt has written for these steps. Those of a lost attempt are overwritten."""
    own = Metric.job_id == job_id, Metric.step.between(first, last), Metric.lease_token == token
    return {step: dict(values) for step, values in session.execute(select(Metric.step, Metric.values).where(*own))}


def delete_after(session: Session, job_id: str, step: int) -> None:
    """Delete the steps that a lost attempt logged after the checkpoint from which the job resumes.

    The job takes these steps again, and the log would otherwise show both attempts as one.
    """
    session.execute(delete(Metric).where(Metric.job_id == job_id, Metric.step > step))


def read(session: Session, job_id: str) -> Iterator[dict[str, Any]]:
    """Every step's numbers in order."""
    rows = session.scalars(select(Metric).where(Metric.job_id == job_id).order_by(Metric.step))
    return ({**row.values, "step": row.step} for row in rows)


def store_csv(session: Session, storage: Storage, job: Job) -> File | None:
    """Upload a job's `step_metrics.csv` and return its row, not yet added; None without a step.

    The key has the lease's token in it, so that two attempts never write the same object.

    What `session` has not committed is rolled back: no transaction is open during the upload.
    """
    rows, project = list(read(session, job.id)), job.project_id
    key = f"jobs/{job.id}/step_metrics-{job.lease_token}.csv"
    if not rows:
        return None
    session.rollback()  # because PostgreSQL ends a transaction that is idle for a minute, and an upload may take longer
    with tempfile.TemporaryFile() as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8", newline="", write_through=True)
        write_csv(rows, text)
        size = raw.tell()
        raw.seek(0)
        digest = hashlib.file_digest(raw, "sha256").hexdigest()
        raw.seek(0)
        storage.put(key, raw)
        text.detach()
    return make_result_file(session, project, filename="step_metrics.csv", key=key, size=size, sha256=digest)


def make_result_file(session: Session, project_id: str, *, filename: str, key: str, size: int, sha256: str) -> File:
    """A row for bytes this service made and has already stored."""
    return File(
        id=new_id("file-"),
        project_id=project_id,
        purpose="fine-tune-results",
        filename=filename,
        bytes=size,
        sha256=sha256,
        storage_key=key,
        status="processed",
        status_details=None,
        validation=None,
        created_at=now(session),
        expires_at=None,
        deleted_at=None,
        deleted_by=None,
    )


def attach_csv(session: Session, job_id: str, file: File | None) -> None:
    """Make `file` the result file of an ended job. If the job has one already or is gone, mark `file` deleted.

    Another reconciler may have been faster. The row stays, because it names the bytes that have to be cleared.

    None: the job logged nothing, so it needs no result file.
    """
    ended = [Job.id == job_id, Job.finished_at.is_not(None)]
    if file is None:
        update_row(session, ended, {"csv_due": None})
        return
    session.add(file)
    session.flush()
    if not update_row(session, [*ended, Job.result_file_id.is_(None)], {"result_file_id": file.id, "csv_due": None}):
        update_row(session, ended, {"csv_due": None})
        file.deleted_at = now(session)


def find_without_csv(session: Session, *, limit: int = 20) -> list[Job]:
    """Ended jobs whose result file is not written yet (cancelled, or their worker was lost), oldest first."""
    due = select(Job).where(Job.csv_due.is_not(None))
    return list(session.scalars(due.order_by(Job.csv_due).limit(limit)))
