"""Locks on folders in the scratch folder, and the removal of what dead attempts left there.

A run holds a lock on a file in its folder while its process lives, and the system releases the lock however the process
ends. So a folder whose lock is free belongs to no run. The database is not asked, so folders of other workers, or of a
database that does not answer, are safe. The flag of a worker that drains is locked in the same way, because several
hosts may share the folder.
"""

import fcntl
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from api.core.logs import get_logger
from api.core.settings import get_settings

LOCK, FLAG, UNHEALTHY = "held", "drain-", "rest-"
# Younger folders are left alone, because a folder is made a moment before it is locked.
YOUNG_SECONDS = 30.0

log = get_logger(__name__)
_raised: list[IO[bytes]] = []


def lock_folder(folder: Path) -> IO[bytes]:
    """Make `folder` this process's until the returned file is closed.

    Raises:
        BlockingIOError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / LOCK).open("wb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise
    return lock


def raise_flag(flag: Path) -> None:
    """Make and lock the file `flag`, until this process ends or removes it."""
    flag.parent.mkdir(parents=True, exist_ok=True)
    file = flag.open("wb")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    _raised.append(file)


@contextmanager
def raised_flag(flag: Path, text: str) -> Iterator[None]:
    """Make and lock the file `flag`, with this text, while the context is open."""
    flag.parent.mkdir(parents=True, exist_ok=True)
    with flag.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.write(text)
        file.flush()
        try:
            yield
        finally:
            flag.unlink(missing_ok=True)


def list_locked() -> list[Path]:
    """The folders of all runs on this host, of any worker."""
    return [path for path in get_settings().scratch().glob("ftjob-*/attempt-*") if not _is_unlocked(path)]


def sweep() -> list[Path]:
    """Remove the folders of attempts and the flags of workers whose locks are free; returns what was removed."""
    scratch = get_settings().scratch()
    left = [path for path in scratch.glob("ftjob-*/attempt-*") if _is_unlocked(path)]
    for folder in left:
        log.warning("removed the folder of a dead attempt", folder=str(folder.relative_to(scratch)))
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # because another attempt's folder is beside it
            folder.parent.rmdir()
    flags = [path for kind in (FLAG, UNHEALTHY) for path in scratch.glob(f"{kind}*") if _is_unlocked(path, path)]
    for flag in flags:
        flag.unlink(missing_ok=True)
    return [*left, *flags]


def _is_unlocked(path: Path, file: Path | None = None) -> bool:
    """Whether `path` is old enough and its lock is free. A folder's lock is a file in it."""
    try:
        if time.time() - path.stat().st_mtime < YOUNG_SECONDS:
            return False
        with (file or path / LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except FileNotFoundError:  # the lock was never taken, or the folder has just gone
        return path.exists()
    return True
