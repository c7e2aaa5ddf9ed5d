"""The files that a job leaves: the tar of its adapter and those of its checkpoints. Reads only."""

from collections.abc import Sequence

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from api.core.db.tables import Adapter, Checkpoint, File, Job
from api.core.errors import NotFound, WrongState

_MAX_STEP = 2**31  # a larger number is an error for PostgreSQL, whose column has 32 bits


def find_files_of(session: Session, rows: Sequence[Checkpoint]) -> dict[str, File]:
    """The files of checkpoints, by id."""
    ids = [row.file_id for row in rows]
    return {file.id: file for file in session.scalars(select(File).where(File.id.in_(ids)))}


def find_tar(session: Session, job: Job, *, checkpoint: str | None) -> File:
    """The file of a job's adapter, or of one of its checkpoints by id or step.

    Raises:
        WrongState: the job has not succeeded.
        NotFound: no such checkpoint, or the model was deleted.
    """
    if checkpoint is not None:
        return session.get_one(File, _checkpoint(session, job, checkpoint).file_id)
    if job.status != "succeeded":
        raise WrongState(f"Job {job.id} is {job.status}; it has no adapter yet.", code="adapter_not_ready")
    adapter = session.get_one(Adapter, job.id)
    if adapter.deleted_at is not None:
        raise NotFound(f"The model {adapter.name!r} has been deleted.", code="model_not_found")
    return session.get_one(File, adapter.file_id)


def _checkpoint(session: Session, job: Job, wanted: str) -> Checkpoint:
    named = Checkpoint.id == wanted
    if wanted.isascii() and wanted.isdecimal() and int(wanted[:12]) < _MAX_STEP:
        named = or_(named, Checkpoint.step == int(wanted))
    found = session.scalar(
        select(Checkpoint).where(Checkpoint.job_id == job.id, Checkpoint.deleted_at.is_(None), named)
    )
    if found is None:
        text = f"Job {job.id} has no checkpoint {wanted!r}."
        raise NotFound(text, code="checkpoint_not_found", param="checkpoint")
    return found
