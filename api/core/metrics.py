"""A run's numbers, one row per optimizer step, and the CSV made of them."""

import hashlib
import io
import tempfile
from collections.abc import Iterator
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from api.core.db import now
from api.core.ids import new_id
from api.core.models import File, Job, Metric
from api.core.storage import Storage
from api.core.transitions import change
from lorainit.results import write_csv


def put(session: Session, job_id: str, token: int, step: int, values: dict[str, Any]) -> None:
    """Insert or complete the row of a step; an evaluation adds its numbers to the step's row."""
    existing = session.get(Metric, (job_id, step), populate_existing=True)
    known = existing.values if existing is not None and existing.lease_token == token else {}
    merged = {**known, **{name: value for name, value in values.items() if value is not None or name not in known}}
    dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
    row = {"lease_token": token, "created_at": now(session), "values": merged}
    statement = dialect.insert(Metric).values(job_id=job_id, step=step, **row)
    session.execute(statement.on_conflict_do_update(index_elements=["job_id", "step"], set_=row))


def forget_after(session: Session, job_id: str, step: int) -> None:
    """Drop what a lost attempt logged beyond the checkpoint it resumes from."""
    session.execute(delete(Metric).where(Metric.job_id == job_id, Metric.step > step))


def read(session: Session, job_id: str) -> Iterator[dict[str, Any]]:
    """Every step's numbers in order."""
    rows = session.scalars(select(Metric).where(Metric.job_id == job_id).order_by(Metric.step))
    return ({**row.values, "step": row.step} for row in rows)


def store_csv(session: Session, storage: Storage, job: Job) -> File | None:
    """Upload a job's `step_metrics.csv` and return its row, not yet added; None without a step.

    What `session` has not committed is rolled back: no transaction is open during the upload.
    """
    rows, project = list(read(session, job.id)), job.project_id
    key = f"jobs/{job.id}/step_metrics-{job.lease_token}.csv"
    if not rows:
        return None
    session.rollback()
    with tempfile.TemporaryFile() as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8", newline="", write_through=True)
        write_csv(rows, text)
        size = raw.tell()
        raw.seek(0)
        digest = hashlib.file_digest(raw, "sha256").hexdigest()
        raw.seek(0)
        storage.put(key, raw)
        text.detach()
    return result_file(session, project, filename="step_metrics.csv", key=key, size=size, sha256=digest)


def result_file(session: Session, project_id: str, *, filename: str, key: str, size: int, sha256: str) -> File:
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


def attach_csv(session: Session, job_id: str, file: File) -> None:
    """Make `file` the result file of an ended job that has none yet, or a deleted file if there is no such job."""
    session.add(file)
    session.flush()
    ended = [Job.id == job_id, Job.finished_at.is_not(None), Job.result_file_id.is_(None)]
    if not change(session, ended, {"result_file_id": file.id}):
        file.deleted_at = now(session)


def ended_without_csv(session: Session, *, limit: int = 20) -> list[Job]:
    """Ended jobs that logged steps and have no result file yet (cancelled, or their worker was lost)."""
    logged = select(Metric.job_id).where(Metric.job_id == Job.id).exists()
    query = select(Job).where(Job.finished_at.is_not(None), Job.result_file_id.is_(None), logged).limit(limit)
    return list(session.scalars(query))
