"""Bytes: a folder or a bucket, chosen by one URL. Keys are made by us, never by a caller.

Everything streams: a 10 GB adapter costs a few megabytes of memory.
"""

import secrets
from collections.abc import Iterator
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import unquote, urlsplit

import obstore
from obstore.store import LocalStore, S3Store

from api.core.settings import Settings, get_settings

CHUNK = 1 << 20
PROBE = "probe/ready-"  # how the keys of `Storage.probe` begin; a process that is killed meanwhile leaves one


class Storage(Protocol):
    """What the service asks of storage."""

    def put(self, key: str, source: BinaryIO | Path | Iterator[bytes]) -> None:
        """Store the bytes of `source` under `key`, replacing what was there."""

    def read(self, key: str, *, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The bytes [start, end) in chunks. FileNotFoundError when there is no such key."""

    def delete(self, key: str) -> None:
        """Remove `key`; nothing happens when it is not there."""

    def older_than(self, time: datetime, *, prefix: str) -> Iterator[str]:
        """Keys under the folder `prefix` whose objects were last written before `time`, in no order."""

    def probe(self) -> None:
        """Write, read and delete a small object; raises when storage is not usable."""


class ObjectStorage:
    """A folder or an S3-compatible bucket behind obstore."""

    def __init__(self, store: LocalStore | S3Store) -> None:
        self._store = store

    def put(self, key: str, source: BinaryIO | Path | Iterator[bytes]) -> None:
        """Store `source`; large objects go up in parts."""
        obstore.put(self._store, key, source)

    def read(self, key: str, *, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Stream [start, end)."""
        size = obstore.head(self._store, key)["size"]
        stop = size if end is None else min(end, size)
        # Ranges of a few megabytes: one connection is never held open by a slow reader.
        for offset in range(start, stop, 8 * CHUNK):
            yield bytes(obstore.get_range(self._store, key, start=offset, end=min(offset + 8 * CHUNK, stop)))

    def delete(self, key: str) -> None:
        """Remove `key`."""
        try:
            obstore.delete(self._store, key)
        except FileNotFoundError:
            return

    def older_than(self, time: datetime, *, prefix: str) -> Iterator[str]:
        """List page by page."""
        for page in obstore.list(self._store, prefix):
            yield from (found["path"] for found in page if found["last_modified"] < time)

    def probe(self) -> None:
        """Write, read and delete."""
        # A name that nobody else has: others probe the same store at the same moment.
        key = f"{PROBE}{secrets.token_hex(8)}"
        obstore.put(self._store, key, b"ok")
        try:
            obstore.get_range(self._store, key, start=0, end=2)
        finally:
            self.delete(key)


def make_storage(url: str, settings: Settings) -> Storage:
    """The storage behind `url`.

    Raises:
        ValueError: neither `file:///folder` nor `s3://bucket[/prefix]`.
    """
    parts = urlsplit(url)
    if parts.scheme == "file":
        folder = Path(unquote(parts.path))
        folder.mkdir(parents=True, exist_ok=True)
        return ObjectStorage(LocalStore(folder))
    if parts.scheme == "s3":
        secret = settings.s3_secret_access_key
        return ObjectStorage(
            S3Store(
                parts.netloc,
                prefix=parts.path.strip("/") or None,
                endpoint=settings.s3_endpoint,
                region=settings.s3_region,
                access_key_id=settings.s3_access_key_id,
                secret_access_key=secret.get_secret_value() if secret else None,
                virtual_hosted_style_request=False,
                client_options={"allow_http": bool(settings.s3_endpoint and settings.s3_endpoint.startswith("http:"))},
            )
        )
    raise ValueError(f"storage URL {url!r} must start with file:// or s3://")


@cache
def get_storage() -> Storage:
    """This process's storage."""
    return make_storage(get_settings().storage(), get_settings())
