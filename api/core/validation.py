"""Are the rows of an uploaded file well formed? Model-independent, streamed, outside transactions."""

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from api.core.models import File
from api.core.storage import Storage
from lorainit.rows import check_file

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


def next_unchecked(session: Session) -> File | None:
    """The oldest file whose rows have not been checked."""
    return session.scalar(
        select(File).where(File.status == "uploaded", File.deleted_at.is_(None)).order_by(File.created_at).limit(1)
    )


def check(storage: Storage, file: File) -> dict[str, object]:
    """Read the whole file once; the columns to write. Needs no session: this can take minutes."""
    report = check_file(io.BufferedReader(_Chunks(storage.read(file.storage_key)), 1 << 20))
    return {
        "status": report.status,
        "status_details": report.status_details,
        "validation": report.model_dump(mode="json"),
    }


def record(session: Session, file_id: str, columns: dict[str, object]) -> None:
    """Write the verdict; a second checker's verdict on the same bytes changes nothing."""
    session.execute(
        update(File)
        .where(File.id == file_id, File.status == "uploaded")
        .values(**columns)
        .execution_options(synchronize_session=False)
    )


class _Chunks(io.RawIOBase):
    """A readable stream over storage's chunks."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        target = memoryview(buffer).cast("B")
        if not self._rest:
            self._rest = memoryview(next(self._chunks, b""))
        size = min(len(target), len(self._rest))
        target[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size
