"""Model names: bases of the catalogue, finished adapters, checkpoints. Opaque, found by exact lookup."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Row, func, select, tuple_
from sqlalchemy.orm import Session

from api.core.access.idempotency import RequestIdentity
from api.core.db import paging
from api.core.db.database import now, session_scope
from api.core.db.tables import Adapter, Checkpoint, File, Job
from api.core.errors import NotFound, WrongState
from api.core.files.files import was_deleted_by
from api.core.models import catalogue

BATCH = 1000  # models of a complete list that are in memory at once: about a megabyte
Named = catalogue.Entry | Adapter | Checkpoint | Row[*tuple[Any, ...]]


@dataclass(frozen=True)
class Model:
    """The model of a name; an adapter of a list is a plain row. `base` is None if it is no longer in the catalogue."""

    named: Named
    base: catalogue.Entry | None


def iterate_batches(project_id: str) -> Iterator[list[Model]]:
    """Bases, then this project's adapters, newest first, in batches. No session is open between two batches, because a
    client may receive them slowly.
    """
    bases, beyond = [Model(entry, entry) for entry in catalogue.get_entries().values()], None
    while True:
        with session_scope(read_only=True) as session:
            rows = _select_adapters(session, project_id, beyond=beyond, limit=BATCH)
        yield bases + [_make_listed(row) for row in rows]
        if len(rows) < BATCH:
            return
        bases, beyond = [], (rows[-1].created_at, rows[-1].job_id)


def list_page(
    session: Session, project_id: str, *, after: str | None, limit: int, search: str
) -> tuple[Sequence[Model], bool]:
    """Part of the same list: what comes after the model `after` and has `search` in its name; True when there is more.

    Raises:
        InvalidValue: `after` is no model of this project.
    """
    entries, beyond = list(catalogue.get_entries().values()), None
    ids = [entry.id for entry in entries]
    if after in ids:
        entries = entries[ids.index(after) + 1 :]
    elif after is not None:
        cursor = session.scalar(select(Adapter).where(Adapter.name == after, Adapter.project_id == project_id))
        if cursor is None:
            raise paging.unknown_cursor(after)
        entries, beyond = [], (cursor.created_at, cursor.job_id)
    bases = [Model(entry, entry) for entry in entries if search.lower() in entry.id.lower()]
    rows = _select_adapters(session, project_id, beyond=beyond, limit=limit + 1, search=search)
    return paging.split_page(bases + [_make_listed(row) for row in rows], limit)


def _select_adapters(
    session: Session, project_id: str, *, beyond: tuple[datetime, str] | None, limit: int, search: str = ""
) -> Sequence[Row[*tuple[Any, ...]]]:
    """Newest first, from behind a position (`created_at`, `job_id`) on."""
    position = tuple_(Adapter.created_at, Adapter.job_id)
    query = (
        select(Adapter.name, Adapter.project_id, Adapter.created_at, Adapter.job_id, Job.model)
        .join(Job, Job.id == Adapter.job_id)
        .where(Adapter.project_id == project_id, Adapter.deleted_at.is_(None))
        .order_by(Adapter.created_at.desc(), Adapter.job_id.desc())
        .limit(limit)
    )
    if beyond is not None:
        query = query.where(position < beyond)
    if search:
        query = query.where(func.lower(Adapter.name).contains(search.lower(), autoescape=True))
    return session.execute(query).all()


def _make_listed(row: Row[*tuple[Any, ...]]) -> Model:
    return Model(row, catalogue.find(row.model))


def find(session: Session, project_id: str, name: str) -> Model:
    """The model of this name in this project."""
    entry = catalogue.find(name)
    if entry is not None:
        return Model(entry, entry)
    found = _find_named(session, project_id, name)
    if found is None or found.deleted_at is not None:
        raise _unknown(name)
    return Model(found, catalogue.find(session.get_one(Job, found.job_id).model))


def delete(session: Session, attempt: RequestIdentity, name: str) -> list[str]:
    """Delete an adapter with its job's checkpoints, or one checkpoint; the job and its results stay.

    Returns:
        Storage keys to clear after the commit.

    Raises:
        NotFound: no such model here.
        WrongState: a base model.
    """
    if catalogue.find(name) is not None:
        raise WrongState(f"Model {name!r} is a base model and cannot be deleted.", code="model_not_deletable")
    found = _find_named(session, attempt.caller.project_id, name, lock=True)
    if found is None:
        raise _unknown(name)
    if found.deleted_at is not None:  # no error if it repeats a delete, because the answer to that one may be lost
        if was_deleted_by(attempt, found.deleted_at, found.deleted_by, at=now(session)):
            return []
        raise _unknown(name)
    return list(_mark_deleted(session, attempt, found))


def _find_named(session: Session, project_id: str, name: str, *, lock: bool = False) -> Adapter | Checkpoint | None:
    adapters = select(Adapter).where(Adapter.name == name, Adapter.project_id == project_id)
    checkpoints = select(Checkpoint).where(Checkpoint.name == name, Checkpoint.project_id == project_id)
    if lock:  # so that two deletes do not both find it
        adapters, checkpoints = adapters.with_for_update(), checkpoints.with_for_update()
    return session.scalar(adapters) or session.scalar(checkpoints)


def _mark_deleted(session: Session, attempt: RequestIdentity, found: Adapter | Checkpoint) -> Iterator[str]:
    at = now(session)
    for row in [found, *(_find_checkpoints(session, found.job_id) if isinstance(found, Adapter) else [])]:
        row.deleted_at, row.deleted_by = at, attempt.caller.key_id
        file = session.get_one(File, row.file_id)
        file.deleted_at, file.deleted_by = at, attempt.caller.key_id
        yield file.storage_key
        if isinstance(row, Checkpoint):
            yield row.state_key
    session.flush()


def _find_checkpoints(session: Session, job_id: str) -> Sequence[Checkpoint]:
    return session.scalars(select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.deleted_at.is_(None))).all()


def _unknown(name: str) -> NotFound:
    return NotFound(f"The model {name!r} does not exist.", code="model_not_found", param="model")
