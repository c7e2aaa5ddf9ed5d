"""Bytes: a folder or a bucket, chosen by one URL. Keys are made by us, so that no caller's text becomes a path.

Everything streams, so a 10 GB adapter needs a few megabytes of memory. Calls give up when the store stops answering
(`BreakerStorage`).
"""

import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol, TypeVar
from urllib.parse import SplitResult, unquote, urlsplit

import obstore
from obstore.exceptions import GenericError
from obstore.store import LocalStore, S3Store

from api.core.resilience.abandonable import run_abandonable
from api.core.resilience.breaker import Breaker
from api.core.settings import Settings, get_settings
from api.core.singleton import singleton

Result = TypeVar("Result")

CHUNK = 1 << 20
BLOCK = 8 * CHUNK  # the most that one request asks of a bucket
CONNECT_SECONDS = 3  # short, because a host that is up accepts at once
REQUEST_SECONDS = 60  # one request to a bucket, which carries some megabytes at most
RETRY_SECONDS = 20  # after which a failed request is not repeated here
PROBE_SECONDS = 4  # after which a probe gives up
TICK_SECONDS = 0.1  # between two checks of the breaker during a call
PROBE = "probe/ready-"  # how keys of `Storage.probe` begin, so that the janitor finds those of killed processes


class StoredObject(NamedTuple):
    """An object that a listing found: its key, and when it was last written, by the clock of the store."""

    key: str
    written_at: datetime


class Storage(Protocol):
    """What the service asks of storage."""

    def put(self, key: str, source: BinaryIO | Path | Iterator[bytes]) -> None:
        """Store the bytes of `source` under `key`, replacing what was there."""

    def read(self, key: str, *, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The bytes [start, end) in chunks. FileNotFoundError when there is no such key."""

    def delete(self, key: str) -> None:
        """Remove `key`; nothing happens when it is not there."""

    def list_older(self, time: datetime, *, prefix: str) -> Iterator[StoredObject]:
        """Objects under the folder `prefix` that were last written before `time`, in no order."""

    def probe(self) -> None:
        """Write, read and delete a small object; raises when storage is not usable."""


class ObjectStorage:
    """A folder or an S3-compatible bucket behind obstore."""

    def __init__(self, store: LocalStore | S3Store) -> None:
        self._store = store

    def put(self, key: str, source: BinaryIO | Path | Iterator[bytes]) -> None:
        """Store `source`; large objects are uploaded in parts."""
        obstore.put(self._store, key, source)

    def read(self, key: str, *, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Stream [start, end)."""
        if end is None or end - start > BLOCK:  # because a request beyond the end of the object is an error
            size = obstore.head(self._store, key)["size"]
            end = size if end is None else min(end, size)
        # In ranges of a few megabytes, so that a slow reader does not hold a connection open.
        for offset in range(start, end, BLOCK):
            yield bytes(obstore.get_range(self._store, key, start=offset, end=min(offset + BLOCK, end)))

    def delete(self, key: str) -> None:
        """Remove `key`."""
        try:
            obstore.delete(self._store, key)
        except FileNotFoundError:
            return

    def list_older(self, time: datetime, *, prefix: str) -> Iterator[StoredObject]:
        """List page by page."""
        for page in obstore.list(self._store, prefix):
            found = (StoredObject(entry["path"], entry["last_modified"]) for entry in page)
            yield from (object for object in found if object.written_at < time)

    def probe(self) -> None:
        """Write, read and delete."""
        # A random name, because other processes probe the same store at the same moment.
        key = f"{PROBE}{secrets.token_hex(8)}"
        obstore.put(self._store, key, b"ok")
        try:
            obstore.get_range(self._store, key, start=0, end=2)
        finally:
            self.delete(key)


class StorageSilent(GenericError):
    """Storage does not answer. It is a `GenericError`, so that callers who retry after those retry after this."""

    def __init__(self) -> None:
        super().__init__("storage does not answer; nothing waits for it until it answers again")


class BreakerStorage:
    """`storage`, whose calls raise `StorageSilent` while `breaker` is open.

    A call of the store cannot be interrupted, so each runs in a thread of its own. When the store stops answering, the
    caller leaves that thread alone. It ends when the store is back, or at the time limits of the bucket.
    """

    def __init__(self, storage: Storage, breaker: Breaker) -> None:
        self._storage, self._breaker = storage, breaker

    def put(self, key: str, source: BinaryIO | Path | Iterator[bytes]) -> None:
        """Store the bytes of `source` under `key`. A call that was left alone may still store them later."""
        self._within(partial(self._storage.put, key, source))

    def read(self, key: str, *, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The bytes [start, end) in chunks."""
        return self._each(self._storage.read(key, start=start, end=end))

    def delete(self, key: str) -> None:
        """Remove `key`."""
        self._within(partial(self._storage.delete, key))

    def list_older(self, time: datetime, *, prefix: str) -> Iterator[StoredObject]:
        """Objects under the folder `prefix` last written before `time`."""
        return self._each(self._storage.list_older(time, prefix=prefix))

    def probe(self) -> None:
        """Write, read and delete a small object."""
        self._within(self._storage.probe)

    def _each(self, items: Iterator[Result]) -> Iterator[Result]:
        while (item := self._within(lambda: next(items, None))) is not None:
            yield item

    def _within(self, call: Callable[[], Result]) -> Result:
        if self._breaker.is_open:
            raise StorageSilent
        asked = self._breaker.clock()

        def check() -> None:
            if self._breaker.is_open:
                raise StorageSilent
            self._breaker.report_silence(asked)

        return run_abandonable(call, name="storage", every=TICK_SECONDS, check=check)


def make_storage(url: str, settings: Settings) -> Storage:
    """The storage behind `url`.

    Raises:
        ValueError: neither `file:///folder` nor `s3://bucket[/prefix]`.
    """
    parts = urlsplit(url)
    if parts.scheme == "file":
        folder = Path(unquote(parts.path))
        folder.mkdir(parents=True, exist_ok=True)
        store = ObjectStorage(LocalStore(folder))
        return BreakerStorage(store, Breaker("storage", store.probe))
    if parts.scheme == "s3":
        bucket = ObjectStorage(_bucket(parts, settings, seconds=REQUEST_SECONDS, retries=5))
        probed = ObjectStorage(_bucket(parts, settings, seconds=PROBE_SECONDS, retries=0))
        return BreakerStorage(bucket, Breaker("storage", probed.probe))
    raise ValueError(f"storage URL {url!r} must start with file:// or s3://")


def _bucket(parts: SplitResult, settings: Settings, *, seconds: int, retries: int) -> S3Store:
    secret = settings.s3_secret_access_key
    return S3Store(
        parts.netloc,
        prefix=parts.path.strip("/") or None,
        endpoint=settings.s3_endpoint,
        region=settings.s3_region,
        access_key_id=settings.s3_access_key_id,
        secret_access_key=secret.get_secret_value() if secret else None,
        virtual_hosted_style_request=False,
        client_options={
            "allow_http": bool(settings.s3_endpoint and settings.s3_endpoint.startswith("http:")),
            "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
            "timeout": timedelta(seconds=seconds),
        },
        retry_config={"max_retries": retries, "retry_timeout": timedelta(seconds=RETRY_SECONDS)},
    )


def list_unfinished(settings: Settings, before: datetime, *, prefix: str) -> Iterator[tuple[str, Path]]:
    """(key, file) of unfinished objects under `prefix` to which nothing was written since `before`.

    In a folder a killed writer leaves `KEY#1`, which no listing shows. In a bucket nothing is found, because there a
    lifecycle rule ends such uploads.
    """
    parts = urlsplit(settings.storage())
    root = Path(unquote(parts.path))
    if parts.scheme != "file":
        return
    for path in (root / prefix).rglob("*#*"):
        key, _, number = str(path.relative_to(root)).rpartition("#")
        with suppress(FileNotFoundError):  # it has just been finished
            if number.isdecimal() and path.stat().st_mtime < before.timestamp():
                yield key, path


@singleton
def get_storage() -> Storage:
    """This process's storage."""
    return make_storage(get_settings().storage(), get_settings())
