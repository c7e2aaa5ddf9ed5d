"""Free space on the volumes that this host writes to, and whether an error means that a disk is full.

A bucket is not a volume, because its free space cannot be asked for. It returns an error when it is full.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sqlalchemy.engine import make_url

from api.core.settings import Settings

FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
# These report it only as text: the object store's library (Rust), SQLite, PostgreSQL, safetensors.
FULL_MESSAGES = (
    "No space left on device",
    "Disk quota exceeded",
    "os error 28)",
    "os error 122)",
    "database or disk is full",
)
_PROBE_BYTES = 4096


@dataclass(frozen=True)
class Volume:
    """A folder the service writes to; `name` is what a message calls it."""

    name: str
    path: Path

    @property
    def free(self) -> int:
        """Bytes this process may still write there."""
        return shutil.disk_usage(_find_existing_parent(self.path)).free

    @property
    def size(self) -> int:
        """Bytes the volume has altogether."""
        return shutil.disk_usage(_find_existing_parent(self.path)).total

    @property
    def device(self) -> int:
        """The number of the disk: equal for folders that share its space, so that nobody counts that space twice."""
        return _find_existing_parent(self.path).stat().st_dev

    def probe(self) -> None:
        """Write a block to the disk and remove it, because only a write shows a quota or a read-only mount.

        Raises:
            OSError: it cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.path, prefix=".probe-") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())


def find_storage_volume(settings: Settings) -> Volume | None:
    """Where stored objects lie; None when that is a bucket."""
    parts = urlsplit(settings.storage())
    return Volume("storage", Path(unquote(parts.path))) if parts.scheme == "file" else None


def find_database_volume(settings: Settings) -> Volume | None:
    """Where SQLite's file lies; None for a server."""
    url = make_url(settings.database())
    return Volume("database", Path(url.database or "").parent) if url.get_backend_name() == "sqlite" else None


def list_worker_volumes(settings: Settings) -> list[Volume]:
    """What a run on this host writes to."""
    here = [Volume("scratch", settings.scratch()), Volume("model cache", settings.models())]
    return [*here, *_drop_missing(find_storage_volume(settings))]


def list_service_volumes(settings: Settings) -> list[Volume]:
    """What the web process and the reconciler write to."""
    return list(_drop_missing(find_storage_volume(settings), find_database_volume(settings)))


def is_full(error: BaseException) -> bool:
    """True when this error, or what caused it, says that a disk or a quota is full.

    Its causes are looked at, too, because libraries wrap the system's error in one of their own.
    """
    return any(_is_full_message(one) for one in _iterate_causes(error))


def find_volume_of(error: BaseException, volumes: list[Volume]) -> Volume | None:
    """The volume whose file the error names; None when it names none of ours."""
    names = [
        Path(one.filename)
        for one in _iterate_causes(error)
        if isinstance(one, OSError) and isinstance(one.filename, str)
    ]
    return next((v for name in names for v in volumes if name.is_relative_to(v.path)), None)


def format_bytes(size: int) -> str:
    """`1.3 GiB`, `96 MiB`: for a sentence."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _is_full_message(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in FULL_ERRNOS:
        return True
    return any(text in str(error) for text in FULL_MESSAGES)


def _iterate_causes(error: BaseException) -> Iterator[BaseException]:
    following: BaseException | None = error
    seen: set[int] = set()
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__


def _drop_missing(*volumes: Volume | None) -> Iterator[Volume]:
    return (volume for volume in volumes if volume is not None)


def _find_existing_parent(path: Path) -> Path:
    """The nearest parent folder that exists, because `path` will be on the same volume."""
    return next(folder for folder in (path, *path.parents) if folder.exists())
