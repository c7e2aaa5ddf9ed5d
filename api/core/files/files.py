"""Files: bytes in storage and a row about them. The bytes are stored first, so that no row is without its bytes.

A deleted file keeps its row, marked as deleted, because jobs and cursors of lists refer to it. A file is in use while
an open job needs it, or while it holds the bytes of a model.
"""

import hashlib
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from typing import BinaryIO, Literal

from obstore.exceptions import BaseError as StoreError
from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from api.core.access.idempotency import RequestIdentity
from api.core.db import paging
from api.core.db.database import now
from api.core.db.tables import Adapter, Checkpoint, File, Job
from api.core.errors import BadReference, NotFound, StorageFull, TooLarge, Unavailable, WrongState
from api.core.files import disk
from api.core.files.storage import BLOCK, CHUNK, Storage
from api.core.ids import new_id
from api.core.settings import get_settings

UPLOADABLE = ("fine-tune", "evals", "user_data")
PAGE_PROBLEMS = 2000  # on a page, so that an answer stays small: most have some hundred bytes, the longest 5 KB
_BATCH = 100  # rows of a page read at once


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Bytes that are in storage and have no row yet."""

    file_id: str
    storage_key: str
    bytes: int
    sha256: str


def store(storage: Storage, source: BinaryIO, *, project_id: str, limit: int) -> Stored:
    """Stream `source` to storage, hashing it on the way.

    Raises:
        TooLarge: there are more than `limit` bytes; nothing is kept.
        StorageFull: they do not fit, or would leave less than `min_free_bytes`; nothing is kept.
        Unavailable: storage cannot be written to.
    """
    _require_disk_space(source)
    file_id = new_id("file-")
    key = f"files/{project_id}/{file_id}"
    digest, size = hashlib.sha256(), 0

    def chunks() -> Iterator[bytes]:
        nonlocal size
        while chunk := source.read(CHUNK):
            size += len(chunk)
            if size > limit:
                raise too_large(limit)
            digest.update(chunk)
            yield chunk

    try:
        storage.put(key, chunks())
    except BaseException as error:  # any, because half an object must not stay
        with suppress(StoreError):  # storage that refuses to write may refuse to delete, too
            storage.delete(key)
        if disk.is_full(error):
            raise disk_full() from error
        if isinstance(error, StoreError):
            raise Unavailable("Storage cannot be written to; try again shortly.", code="not_ready") from error
        raise
    return Stored(file_id=file_id, storage_key=key, bytes=size, sha256=digest.hexdigest())


def too_large(limit: int) -> TooLarge:
    """The refusal for a file above `limit`."""
    return TooLarge(f"file is larger than {limit} bytes, the largest upload.", code="file_too_large", param="file")


def disk_full() -> StorageFull:
    """The refusal when a disk of the server is full."""
    return StorageFull("The server has too little disk space for this file.", code="insufficient_storage")


def _require_disk_space(source: BinaryIO) -> None:
    """Keep `min_free_bytes` free, because the database and running jobs write to the same disk."""
    settings = get_settings()
    volume = disk.find_storage_volume(settings)
    size = source.seek(0, os.SEEK_END)
    source.seek(0)
    if volume is not None and volume.free - size < settings.min_free_bytes:
        raise disk_full()


@contextmanager
def remove_on_error(session: Session, storage: Storage, stored: Stored) -> Iterator[None]:
    """Delete the bytes if the block fails, so that none stay without a row. `session` is rolled back first."""
    try:
        yield
    except BaseException:
        session.close()
        with suppress(StoreError):  # then they are an orphan, which the reconciler removes
            storage.delete(stored.storage_key)
        raise


def add(
    session: Session, stored: Stored, *, project_id: str, filename: str, purpose: str, lifetime: int | None
) -> File:
    """The row of an uploaded file; its rows are checked later."""
    at = now(session)
    file = File(
        id=stored.file_id,
        project_id=project_id,
        purpose=purpose,
        filename=filename,
        bytes=stored.bytes,
        sha256=stored.sha256,
        storage_key=stored.storage_key,
        status="uploaded" if purpose == "fine-tune" else "processed",
        status_details=None,
        validation=None,
        created_at=at,
        expires_at=None if lifetime is None else at + timedelta(seconds=lifetime),
        deleted_at=None,
        deleted_by=None,
    )
    session.add(file)
    session.flush()
    return file


def find(session: Session, project_id: str, file_id: str) -> File:
    """A file of this project, by the id in the path."""
    file = session.get(File, file_id)
    if file is None or file.project_id != project_id or file.deleted_at is not None:
        raise NotFound(f"No such File object: {file_id}", code="file_not_found", param="file_id")
    return file


def find_readable(session: Session, project_id: str, file_id: str) -> File:
    """A file whose bytes may be read: known and not expired."""
    file = find(session, project_id, file_id)
    if is_expired(file, now(session)):
        raise NotFound(f"File {file_id} has expired.", code="file_not_found", param="file_id")
    return file


def read(storage: Storage, file: File, *, start: int, end: int) -> bytes:
    """The first of the bytes [start, end) of a file: `BLOCK` at most, and at least one unless the range is empty.

    Raises:
        NotFound: storage does not have the bytes.
        Unavailable: storage does not answer.
    """
    try:
        return next(storage.read(file.storage_key, start=start, end=min(end, start + BLOCK)), b"")
    except FileNotFoundError as error:
        raise NotFound(f"The bytes of file {file.id} are gone.", code="file_not_found", param="file_id") from error
    except Exception as error:  # every store has its own kinds
        raise Unavailable("Storage cannot be reached; try again shortly.", code="not_ready") from error


def is_expired(file: File, at: datetime) -> bool:
    """Past its `expires_after`."""
    return file.expires_at is not None and file.expires_at <= at


def find_usable(session: Session, project_id: str, file_id: str, *, param: str) -> File:
    """A file that a job of this project may train on.

    It is locked against deletion until the commit, because only then does a job refer to it.
    """
    query = select(File).where(File.id == file_id, File.project_id == project_id, File.deleted_at.is_(None))
    file = session.scalar(query.with_for_update(read=True))
    if file is None:
        raise BadReference(f"{param}: no such file {file_id!r}.", code="file_not_found", param=param)
    if file.purpose != "fine-tune":
        raise BadReference(
            f"{param}: file {file_id} has purpose {file.purpose!r}; a job needs 'fine-tune'.",
            code="invalid_file_purpose",
            param=param,
        )
    if is_expired(file, now(session)):
        raise BadReference(f"{param}: file {file_id} has expired.", code="file_expired", param=param)
    return file


def list_page(
    session: Session,
    project_id: str,
    *,
    after: str | None,
    limit: int,
    purpose: str | None,
    order: Literal["asc", "desc"],
) -> tuple[Sequence[File], bool]:
    """Files of a project by time of upload; True when there are more.

    A page ends early when its files have more than `PAGE_PROBLEMS` errors and warnings, because each is in the answer.
    """
    query = select(File).where(File.project_id == project_id, File.deleted_at.is_(None))
    if purpose is not None:
        query = query.where(File.purpose == purpose)
    query = paging.order_after(session, query, File, project_id=project_id, after=after, descending=order == "desc")
    found, problems = list[File](), 0
    with closing(session.scalars(query.limit(limit + 1).execution_options(yield_per=_BATCH))) as files:
        for file in files:
            problems += _count_problems(file)
            if len(found) == limit or (found and problems > PAGE_PROBLEMS):
                return found, True
            found.append(file)
    return found, False


def _count_problems(file: File) -> int:
    report = file.validation or {}
    return len(report.get("errors", ())) + len(report.get("warnings", ()))


def delete(session: Session, attempt: RequestIdentity, file_id: str) -> str | None:
    """Delete a file; the storage key to clear after the commit, None when a retry finds it gone.

    Raises:
        NotFound: no such file here.
        WrongState: a job or a model needs it.
    """
    file = session.scalar(select(File).where(File.id == file_id).with_for_update())
    if file is not None and was_deleted_by(attempt, file.deleted_at, file.deleted_by, at=now(session)):
        return None
    file = find(session, attempt.caller.project_id, file_id)
    user = describe_use(session, file)
    if user is not None:
        raise WrongState(f"File {file_id} is in use by {user}.", code="file_in_use", param="file_id")
    mark_deleted(session, file, by=attempt.caller.key_id)
    session.flush()
    return file.storage_key


def mark_deleted(session: Session, file: File, *, by: str | None = None) -> None:
    """Mark a file deleted. Its report is deleted now, because it quotes rows; `retention` removes the bytes."""
    file.deleted_at, file.deleted_by = now(session), by
    file.validation = file.status_details = None


def find_existing(session: Session, wanted: Collection[tuple[str, str]]) -> set[tuple[str, str]]:
    """The pairs (project, SHA-256) for which the project has a file that is not deleted."""
    found = set[tuple[str, str]]()
    rest = iter(sorted(wanted))
    while batch := list(islice(rest, 500)):  # in parts, because databases limit the parameters of a statement
        projects, digests = ({pair[index] for pair in batch} for index in (0, 1))
        query = select(File.project_id, File.sha256).where(File.project_id.in_(projects), File.sha256.in_(digests))
        found |= {(owner, sha256) for owner, sha256 in session.execute(query.where(File.deleted_at.is_(None)))}
    return found & set(wanted)


def was_deleted_by(
    attempt: RequestIdentity, deleted_at: datetime | None, deleted_by: str | None, *, at: datetime
) -> bool:
    """True when this request repeats a delete by the same key whose answer was lost."""
    if deleted_at is None or not attempt.is_retry or deleted_by != attempt.caller.key_id:
        return False
    return deleted_at > at - attempt.window


def describe_use(session: Session, file: File) -> str | None:
    """What needs this file (an open job or a model), as a part of a sentence; None if it may be deleted."""
    job = session.scalar(
        select(Job.id)
        .where(
            Job.project_id == file.project_id,
            Job.finished_at.is_(None),
            or_(
                Job.training_file_id == file.id,
                Job.validation_file_id == file.id,
                Job.calibration_file_id == file.id,
            ),
        )
        .limit(1)
    )
    if job is not None:
        return f"job {job}, which has not ended"
    for table in (Adapter, Checkpoint):
        name = session.scalar(select(table.name).where(table.file_id == file.id, table.deleted_at.is_(None)))
        if name is not None:
            return f"model {name}; delete the model instead"
    return None
