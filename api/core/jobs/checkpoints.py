"""Stored checkpoints of a job: the last few and the best one.

Deleting only marks a row, because cursors of lists refer to it and its bytes are cleared after the commit.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from api.core.db.database import now
from api.core.db.tables import Checkpoint, File, Job
from api.core.errors import InvalidValue
from api.core.ids import new_id
from api.core.settings import get_settings


def add(session: Session, job: Job, *, step: int, metrics: dict[str, Any], file: File, state_key: str) -> Checkpoint:
    """A row for a checkpoint whose bytes are in storage. A repeated step replaces the earlier row."""
    for old in session.scalars(select(Checkpoint).where(Checkpoint.job_id == job.id, Checkpoint.step == step)):
        session.get_one(File, old.file_id).deleted_at = now(session)
        session.delete(old)
    session.add(file)
    session.flush()  # because the checkpoint's row refers to the file's
    checkpoint = Checkpoint(
        id=new_id("ftckpt_"),
        job_id=job.id,
        project_id=job.project_id,
        name="",
        step=step,
        metrics=metrics,
        best=False,
        file_id=file.id,
        state_key=state_key,
        created_at=now(session),
        deleted_at=None,
        deleted_by=None,
    )
    checkpoint.name = checkpoint_name(job, step)
    session.add(checkpoint)
    session.flush()
    _mark_best(session, job.id)
    return checkpoint


def find_latest(session: Session, job_id: str) -> Checkpoint | None:
    """The checkpoint a run resumes from."""
    return session.scalar(_select_kept(job_id).limit(1))


def supersede(session: Session, job_id: str, *, keep: int) -> None:
    """Delete checkpoints beyond the last `keep` that are not the best; `retention` clears their bytes."""
    for checkpoint in session.scalars(_select_kept(job_id).offset(keep)).all():
        if not checkpoint.best:
            mark_deleted(session, checkpoint)


def mark_deleted(session: Session, checkpoint: Checkpoint, *, by: str | None = None) -> None:
    """Mark a checkpoint and its adapter's file deleted."""
    file = session.get_one(File, checkpoint.file_id)
    checkpoint.deleted_at = file.deleted_at = now(session)
    checkpoint.deleted_by = file.deleted_by = by


def mark_all_deleted(session: Session, job_id: str) -> None:
    """Mark every checkpoint deleted that a job still has."""
    for checkpoint in session.scalars(_select_kept(job_id)).all():
        mark_deleted(session, checkpoint)


def list_page(session: Session, job_id: str, *, after: str | None, limit: int) -> tuple[Sequence[Checkpoint], bool]:
    """Newest first, `limit` of them after the checkpoint `after`; True when there are more."""
    query = _select_kept(job_id).limit(limit + 1)
    if after is not None:
        cursor = session.get(Checkpoint, after)
        if cursor is None or cursor.job_id != job_id:
            raise InvalidValue(f"after {after!r} is not a checkpoint of this job.", code="invalid_value", param="after")
        query = query.where(Checkpoint.step < cursor.step)
    rows = session.scalars(query).all()
    return rows[:limit], len(rows) > limit


def model_name(job: Job) -> str:
    """`ft:<base>:<org>:<suffix>:<id8>`, as OpenAI writes it. Nothing parses it."""
    short = job.id.removeprefix("ftjob-")[:8]
    return f"ft:{job.model}:{get_settings().organization}:{job.suffix or ''}:{short}"


def checkpoint_name(job: Job, step: int) -> str:
    """The name a checkpoint is called by as a model."""
    return f"{model_name(job)}:ckpt-step-{step}"


def _select_kept(job_id: str) -> Select[Checkpoint]:
    return (
        select(Checkpoint)
        .where(Checkpoint.job_id == job_id, Checkpoint.deleted_at.is_(None))
        .order_by(Checkpoint.step.desc())
    )


def _mark_best(session: Session, job_id: str) -> None:
    rows = session.scalars(_select_kept(job_id)).all()
    scored = [(row.metrics["full_valid_loss"], row) for row in rows if row.metrics.get("full_valid_loss") is not None]
    best = min(scored, key=lambda pair: pair[0])[1] if scored else None
    for row in rows:
        row.best = row is best
