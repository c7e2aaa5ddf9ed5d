"""Model names: bases of the catalogue, finished adapters, checkpoints. Opaque, found by exact lookup."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from api.core import catalogue
from api.core.db import now
from api.core.errors import NotFound, WrongState
from api.core.files import gone_by
from api.core.idempotency import Attempt
from api.core.models import Adapter, Checkpoint, File, Job

Named = catalogue.Entry | Adapter | Checkpoint


@dataclass(frozen=True)
class Model:
    """What a name stands for; `base` is None when the base has left the catalogue."""

    named: Named
    base: catalogue.Entry | None


def every(session: Session, project_id: str) -> list[Model]:
    """Bases, then this project's adapters, newest first."""
    adapters = session.execute(
        select(Adapter, Job.model)
        .join(Job, Job.id == Adapter.job_id)
        .where(Adapter.project_id == project_id, Adapter.deleted_at.is_(None))
        .order_by(Adapter.created_at.desc(), Adapter.job_id.desc())
    ).all()
    bases = [Model(entry, entry) for entry in catalogue.entries().values()]
    return bases + [Model(adapter, catalogue.find(base)) for adapter, base in adapters]


def find(session: Session, project_id: str, name: str) -> Model:
    """What `name` stands for in this project."""
    entry = catalogue.find(name)
    if entry is not None:
        return Model(entry, entry)
    found = _named(session, project_id, name)
    if found is None or found.deleted_at is not None:
        raise _unknown(name)
    return Model(found, catalogue.find(session.get_one(Job, found.job_id).model))


def delete(session: Session, attempt: Attempt, name: str) -> list[str]:
    """Delete an adapter with its job's checkpoints, or one checkpoint; the job and its results stay.

    Returns:
        Storage keys to clear after the commit.

    Raises:
        NotFound: no such model here.
        WrongState: a base model.
    """
    if catalogue.find(name) is not None:
        raise WrongState(f"Model {name!r} is a base model and cannot be deleted.", code="model_not_deletable")
    found = _named(session, attempt.caller.project_id, name, lock=True)
    if found is None:
        raise _unknown(name)
    if found.deleted_at is not None:
        if gone_by(attempt, found.deleted_at, found.deleted_by, at=now(session)):
            return []
        raise _unknown(name)
    return list(_bury(session, attempt, found))


def _named(session: Session, project_id: str, name: str, *, lock: bool = False) -> Adapter | Checkpoint | None:
    adapters = select(Adapter).where(Adapter.name == name, Adapter.project_id == project_id)
    checkpoints = select(Checkpoint).where(Checkpoint.name == name, Checkpoint.project_id == project_id)
    if lock:
        adapters, checkpoints = adapters.with_for_update(), checkpoints.with_for_update()
    return session.scalar(adapters) or session.scalar(checkpoints)


def _bury(session: Session, attempt: Attempt, found: Adapter | Checkpoint) -> Iterator[str]:
    at = now(session)
    for row in [found, *(_checkpoints(session, found.job_id) if isinstance(found, Adapter) else [])]:
        row.deleted_at, row.deleted_by = at, attempt.caller.key_id
        file = session.get_one(File, row.file_id)
        file.deleted_at, file.deleted_by = at, attempt.caller.key_id
        yield file.storage_key
        if isinstance(row, Checkpoint):
            yield row.state_key
    session.flush()


def _checkpoints(session: Session, job_id: str) -> Sequence[Checkpoint]:
    return session.scalars(select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.deleted_at.is_(None))).all()


def _unknown(name: str) -> NotFound:
    return NotFound(f"The model {name!r} does not exist.", code="model_not_found", param="model")
