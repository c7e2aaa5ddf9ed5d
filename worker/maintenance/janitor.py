"""Retention: chores of the reconciler that free space. Each works in batches, in short
transactions, and is safe to repeat, to interrupt and to run twice at once.

What a run left in the scratch folder of its host is that host's worker's to remove (`worker.host.scratch`).
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
SWEEPS = 2 * HOUR  # every orphan that is old enough has been swept within this
STALLED = 10 * MINUTE  # whoever goes on with an object after that is told that it is gone, and tries again
BATCH = 500
ANOTHER_DATABASE = (
    "The mark in storage is not the one that this database left there. Was the database restored from a backup, or do"
    " two databases use this storage? Objects without a row that were written before now are not removed as orphans."
)

log = get_logger(__name__)


def expire_files() -> bool:
    """Files past their `expires_after` are deleted; True when there may be more."""
    with session_scope() as session:
        gone = retention.expire_files(session)
        counters.add(session, "objects_removed", len(gone), reason="expired")
        session.commit()
    return bool(gone)


def delete_checkpoints() -> bool:
    """Checkpoints of jobs long ended are deleted; True when there may be more."""
    days = get_settings().checkpoint_days
    if not days:
        return False
    with session_scope() as session:
        gone = retention.delete_checkpoints(session, days=days)
        counters.add(session, "objects_removed", len(gone), reason="checkpoint")
        session.commit()
    return bool(gone)


def delete_jobs() -> bool:
    """Jobs long ended go, first what they left behind and then they themselves; True when there may be more.

    Not before `sweep_orphans` has looked for what a crash of theirs left: it knows objects by their job.
    """
    settings = get_settings()
    if not settings.job_days:
        return False
    days = max(settings.job_days, settings.orphan_days + SWEEPS / DAY)
    with session_scope() as session:
        retired = retention.retire_jobs(session, days=days)
        removed = retention.remove_jobs(session, days=days)
        counters.add(session, "objects_removed", len(removed), reason="job")
        session.commit()
    return bool(retired or removed)


def delete_old_creations() -> bool:
    """What was remembered of creates, in case they were repeated, goes after a day."""
    with session_scope() as session:
        idempotency.delete_expired(session)
        session.commit()
    return False


def clear() -> bool:
    """The bytes of deleted rows go, and what was quoted of them; True when there may be more."""
    return any([_clear(File), _clear(Checkpoint)])


def _clear(kind: retention.Row) -> bool:
    with session_scope(read_only=True) as session:
        rows = retention.find_uncleared(session, kind)
        keys = retention.find_unreferenced(session, (key for _, key in rows)) if rows else set()
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
    """What was overwritten in the database leaves its log, too."""
    cut_write_ahead_log()
    return False


def check_storage_owner() -> bool:
    """Find out whether database and storage still belong together, and leave a new mark of that in both."""
    with session_scope(read_only=True) as session:
        seen, key = storage_periods.find_newest(session), storage_periods.find_marker_key(session)
    mark = None if key is None else _mark(key)
    with session_scope() as session:
        look = (
            storage_periods.begin_period(session)
            if seen is None
            else storage_periods.extend_period(session, seen, mark)
        )
        key = storage_periods.find_marker_key(session)
        session.commit()
    if look is None or key is None:
        return False
    if seen is not None and seen.lasted and not seen.knows(mark):
        log.warning("storage_of_another_database", mark=key, help=ANOTHER_DATABASE)
    get_storage().put(key, io.BytesIO(look.next_token.encode()))
    with session_scope() as session:
        storage_periods.confirm_period(session, look)
        session.commit()
    return False


def _mark(key: str) -> str | None:
    try:
        return b"".join(get_storage().read(key)).decode("ascii", "replace")
    except FileNotFoundError:
        return None


def sweep_orphans() -> bool:
    """Stored objects that a crash left without a row go, a day after they were written.

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
        if key.startswith(PROBE):  # the bucket may be others' too
            get_storage().delete(key)
    return False


def sweep_unfinished() -> bool:
    """Parts of objects whose writer was killed go once nothing more is written to them."""
    before = datetime.now(UTC) - timedelta(seconds=STALLED)
    left = [found for prefix in retention.OWNERS for found in list_unfinished(get_settings(), before, prefix=prefix)]
    while left:
        batch, left = left[:BATCH], left[BATCH:]
        with session_scope(read_only=True) as session:
            ours = retention.find_owned(session, [key for key, _ in batch])
        for key, path in batch:
            if key in ours:
                path.unlink(missing_ok=True)
                log.warning("removed what was never stored to its end", key=key)
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


# How long each waits once it has nothing left to do.
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
