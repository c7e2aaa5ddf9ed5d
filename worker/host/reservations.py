"""Disk space that runs of this host have reserved and not written yet, so that two do not count on the same bytes.

A reservation is a file in the run's scratch folder and is valid while the folder is locked (`worker.host.scratch`).
The system releases the lock however a process ends, so no reservation has to be taken back.
"""

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from api.core.files import disk
from api.core.settings import Settings
from worker.host import scratch

RESERVATION = "promised.json"
_LOCK = "reserving"


@contextmanager
def lock_reservations(settings: Settings) -> Iterator[None]:
    """Let only one process of this host check and reserve space, so that two do not count on the same bytes."""
    settings.scratch().mkdir(parents=True, exist_ok=True)
    with (settings.scratch() / _LOCK).open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def reserve(folder: Path, needed: Mapping[int, int]) -> None:
    """Reserve so many bytes of each device for the run that has locked `folder`."""
    (folder / RESERVATION).write_text(json.dumps({str(device): size for device, size in needed.items()}))


def sum_outstanding(settings: Settings, *, besides: Path | None = None) -> dict[int, int]:
    """Bytes by device that runs other than the one in `besides` have reserved and not written yet."""
    found: dict[int, int] = {}
    for folder in scratch.list_locked():
        if folder != besides:
            for device, size in _left(folder, settings).items():
                found[device] = found.get(device, 0) + size
    return found


def _left(folder: Path, settings: Settings) -> dict[int, int]:
    try:
        reserved = {int(device): int(size) for device, size in json.loads((folder / RESERVATION).read_text()).items()}
    except (OSError, ValueError):  # no reservation yet, one that is being written, or one that is gone
        return {}
    for written in (folder, *_stored(folder, settings)):
        with suppress(OSError):
            device = written.stat().st_dev
            reserved[device] = reserved.get(device, 0) - _size(written)
    return {device: size for device, size in reserved.items() if size > 0}


def _stored(folder: Path, settings: Settings) -> list[Path]:
    """The folder of the job's checkpoints and adapter, if storage is a folder."""
    storage = disk.find_storage_volume(settings)
    return [] if storage is None else [storage.path / "jobs" / folder.parent.name]


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # gone since it was listed
            total += path.stat().st_size if path.is_file() else 0
    return total
