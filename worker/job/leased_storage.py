"""Storage for one run: a transfer ends at its next chunk once the job is not ours any more.

Nobody waits for the transfer by then (`worker.job.retry`). It has to end because ten gigabytes of a cancelled job would
slow down the transfers of the next one.
"""

import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from api.core.files.storage import CHUNK, Storage, StoredObject
from worker.job.progress import LeaseLost


class LeasedStorage:
    """`storage`, whose transfers raise `LeaseLost` after `lost` is set. Such a put leaves nothing under its key."""

    def __init__(self, storage: Storage, lost: threading.Event) -> None:
        self._storage, self._lost = storage, lost

    def put(self, key: str, source: BinaryIO | Path | Iterator[bytes]) -> None:
        """Store the bytes of `source` under `key`."""
        self._storage.put(key, self._checked(_chunks(source)))

    def read(self, key: str, *, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The bytes [start, end) in chunks."""
        return self._checked(self._storage.read(key, start=start, end=end))

    def delete(self, key: str) -> None:
        """Remove `key`."""
        self._storage.delete(key)

    def list_older(self, time: datetime, *, prefix: str) -> Iterator[StoredObject]:
        """Objects under the folder `prefix` last written before `time`."""
        return self._storage.list_older(time, prefix=prefix)

    def probe(self) -> None:
        """Write, read and delete a small object."""
        self._storage.probe()

    def _checked(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            if self._lost.is_set():
                raise LeaseLost
            yield chunk


def _chunks(source: BinaryIO | Path | Iterator[bytes]) -> Iterator[bytes]:
    if isinstance(source, Path):
        with source.open("rb") as file:
            yield from _chunks(file)
    elif isinstance(source, Iterator) and not hasattr(source, "read"):
        yield from source
    else:
        while chunk := source.read(CHUNK):
            yield chunk
