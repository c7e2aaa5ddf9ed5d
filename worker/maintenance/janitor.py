"""Retention: chores of the reconciler that free space. Each works in batches, in short
transactions, and is safe to repeat, to interrupt and to run twice at once.

Scratch folders are not cleaned here, because only the workers of a host can reach them (`worker.host.scratch`).
"""

import io
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from itertools import islice

from api.core.access import idempotency
from api.core.db.database import cut_write_ahead_log, session_scope
from api.core.db.tables import Checkpoint, File
from api.core.files.storage import PROBE, get_storage, list_unfinished
from api.core.logs import get_logger
from api.core.maintenance import redaction, retention, storage_periods
from api.core.monitoring import counters
from api.core.settings import get_settings

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
SWEEPS = 2 * HOUR  # within this time every orphan that is old enough has been removed
STALLED = 10 * MINUTE  # a writer that goes on after this gets an error and tries again
BATCH = 500  # keys of one query, because databases limit the parameters of a statement
ANOTHER_DATABASE = (
    "The mark in storage is not the one that this database left there. Was the database restored from a backup, or do"
    " two databases use this storage? Objects without a row that were written before now are not removed as orphans."
)

log = get_logger(__name__)


def expire_files() -> bool:
    """Delete files past their `expires_after`; True if there may be more."""
    with session_scope() as session:
        gone = retention.expire_files(session)
        counters.add(session, "objects_removed", len(gone), reason="expired")
        session.commit()
    return bool(gone)


def delete_checkpoints() -> bool:
    """Delete checkpoints of jobs that ended long ago; True if there may be more."""
    days = get_settings().checkpoint_days
    if not days:
        return False
    with session_scope() as session:
        gone = retention.delete_checkpoints(session, days=days)
        counters.add(session, "objects_removed", len(gone), reason="checkpoint")
        session.commit()
    return bool(gone)


def delete_jobs() -> bool:
    """Delete jobs that ended long ago, first their files and then their rows; True if there may be more.

    They stay until `sweep_orphans` has removed what their crashes left, because it finds the owner of an object by the
    job's row.
    """
    settings = get_settings()
    if not settings.job_days:
        return False
    days = max(settings.job_days, settings.orphan_days + SWEEPS / DAY)  # so that orphans are swept before
    with session_scope() as session:
        retired = retention.retire_jobs(session, days=days)
        removed = retention.remove_jobs(session, days=days)
        counters.add(session, "objects_removed", len(removed), reason="job")
        session.commit()
    return bool(retired or removed)


def delete_old_creations() -> bool:
    """Delete the records of create requests after a day, when none can be repeated any more."""
    with session_scope() as session:
        idempotency.delete_expired(session)
        session.commit()
    return False


def clear() -> bool:
    """Remove the bytes of deleted rows, and quotes of them; True if there may be more."""
    return any([_clear(File), _clear(Checkpoint)])


def _clear(kind: retention.Row) -> bool:
    with session_scope(read_only=True) as session:
        rows = retention.find_uncleared(session, kind)
        keys = retention.find_unreferenced(session, (key for _, key in rows)) if rows else set()
    # Bytes first and then the mark, so that a crash in between repeats the deletion instead of forgetting it.
    for key in keys:
        get_storage().delete(key)
    if rows:
        with session_scope() as session:
            ids = [row_id for row_id, _ in rows]
            if kind is File:
                redaction.redact_quotes(session, ids)
            retention.mark_cleared(session, kind, ids)
            session.commit()
    return bool(rows)


def cut_database_log() -> bool:
    """Remove deleted rows from SQLite's log, too."""
    cut_write_ahead_log()
    return False


def check_storage_owner() -> bool:
    """Find out whether database and storage still belong together, and write a new mark to both."""
    with session_scope(read_only=True) as session:
        seen, key = storage_periods.find_newest(session), storage_periods.find_marker_key(session)
    mark = None if key is None else _mark(key)
    with session_scope() as session:
        current = (
            storage_periods.begin_period(session)
            if seen is None
            else storage_periods.extend_period(session, seen, mark)
        )
        key = storage_periods.find_marker_key(session)
        session.commit()
    if current is None or key is None:
        return False
    if seen is not None and seen.lasted and not seen.knows(mark):
        log.warning("storage_of_another_database", mark=key, help=ANOTHER_DATABASE)
    # Between two commits: after a crash here the mark is one of the two tokens, so it is still recognized.
    get_storage().put(key, io.BytesIO(current.next_token.encode()))
    with session_scope() as session:
        storage_periods.confirm_period(session, current)
        session.commit()
    return False


def _mark(key: str) -> str | None:
    try:
        return b"".join(get_storage().read(key)).decode("ascii", "replace")
    except FileNotFoundError:
        return None


def sweep_orphans() -> bool:
    """Remove stored objects that a crash left without a row, a day after they were written.

    Objects that this database may not know because it was restored from a backup stay
    (`api.core.maintenance.storage_periods`).
    """
    days = get_settings().orphan_days
    if not days:
        return False
    before = datetime.now(UTC) - timedelta(days=days)
    with session_scope(read_only=True) as session:
        watched = storage_periods.list_periods(session)
    for prefix in retention.OWNERS:
        old = get_storage().list_older(before, prefix=prefix)
        keys = (key for key, written in old if any(since <= written <= until for since, until in watched))
        while batch := list(islice(keys, BATCH)):
            _remove_orphans(batch)
    for key, _ in get_storage().list_older(before, prefix=PROBE.partition("/")[0]):
        if key.startswith(PROBE):  # because others may use the bucket, too
            get_storage().delete(key)
    return False


def sweep_unfinished() -> bool:
    """Remove unfinished objects whose writer was killed: those to which nothing is written any more."""
    before = datetime.now(UTC) - timedelta(seconds=STALLED)
    left = [found for prefix in retention.OWNERS for found in list_unfinished(get_settings(), before, prefix=prefix)]
    while left:
        batch, left = left[:BATCH], left[BATCH:]
        with session_scope(read_only=True) as session:
            ours = retention.find_owned(session, [key for key, _ in batch])
        for key, path in batch:
            if key in ours:
                path.unlink(missing_ok=True)
                log.warning("removed an unfinished object", key=key)
    return False


def _remove_orphans(keys: list[str]) -> None:
    with session_scope(read_only=True) as session:
        gone = retention.find_orphans(session, keys)
    for key in sorted(gone):
        get_storage().delete(key)
        log.warning("removed an object that no row names", key=key)
    if gone:
        with session_scope() as session:
            counters.add(session, "objects_removed", len(gone), reason="orphan")
            session.commit()


# Seconds that each chore waits once it has nothing left to do.
PAUSES: Mapping[Callable[[], object], float] = {
    expire_files: MINUTE,
    delete_checkpoints: HOUR,
    delete_jobs: HOUR,
    delete_old_creations: HOUR,
    check_storage_owner: MINUTE,
    cut_database_log: MINUTE / 2,
    sweep_orphans: HOUR,
    sweep_unfinished: STALLED,
}
