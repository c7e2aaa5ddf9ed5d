"""Removes cache entries that were made of deleted files. Each worker cleans the cache of its own host.

The name of an entry says of which project's files it was made (`lorainit.config.cache_names`), and the database says
which files exist. So no worker has to be notified of a deletion, and one that was down meanwhile sweeps when it is
back. An entry that a cancelled run writes just after a sweep is found by the next sweep.

Compiled kernels are made of no files. They are removed after a month, because new versions need others.
"""

import time
from collections.abc import Iterator
from pathlib import Path

from api.core.db.database import session_scope
from api.core.files import files
from api.core.settings import get_settings
from lorainit.config import cache_names

STALE_SECONDS = 3600.0  # a writer that has not finished after this has crashed
KERNEL_SECONDS = 30 * 86400.0


def sweep() -> list[Path]:
    """Remove entries that were made of deleted files, or whose names do not say of what; their paths."""
    found = {path: cache_names.parse_rows(path.name) for path in _entries()}
    made_of = {(rows.owner, sha256) for rows in found.values() if rows for sha256 in rows.files}
    with session_scope(read_only=True) as session:
        there = files.find_existing(session, made_of)
    gone = [path for path, rows in found.items() if not _may_be_kept(path, rows, there)]
    gone += [path for path in _kernels() if _is_older(path, KERNEL_SECONDS)]
    for path in gone:
        path.unlink(missing_ok=True)
    return gone


def _entries() -> Iterator[Path]:
    for kind in cache_names.OF_ROWS:
        folder = get_settings().models() / kind
        yield from folder.iterdir() if folder.is_dir() else ()


def _kernels() -> Iterator[Path]:
    return (path for path in (get_settings().models() / cache_names.KERNELS).rglob("*") if not path.is_dir())


def _may_be_kept(path: Path, rows: cache_names.SourceRows | None, there: set[tuple[str, str]]) -> bool:
    if rows is None:  # made of a base model alone, or by an earlier release, whose entries are not read any more
        return cache_names.is_without_rows(path.name)
    left_by_a_crash = path.name.startswith(".") and _is_older(path, STALE_SECONDS)
    return all((rows.owner, sha256) in there for sha256 in rows.files) and not left_by_a_crash


def _is_older(path: Path, seconds: float) -> bool:
    try:
        return time.time() - path.stat().st_mtime > seconds
    except FileNotFoundError:
        return False
