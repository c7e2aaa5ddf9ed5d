"""What may be deleted: expired files, old checkpoints, jobs that ended long ago, bytes of deleted rows, orphans.

Row first, then bytes: a row is marked deleted, later its bytes are removed and that is noted
(`cleared_at`). So a crash in between leaves a row that is found again. Nothing is ever marked
that a job needs which has not ended. Functions take a session first and never commit.
"""

from collections.abc import Collection, Iterable, Sequence
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, Select, delete, or_, select, update
from sqlalchemy.orm import InstrumentedAttribute, Session

from api.core.db.database import now
from api.core.db.tables import Adapter, Checkpoint, Event, File, Job, JobLabel, Metric, Project
from api.core.files import files
from api.core.jobs import checkpoints

# Whose objects may be orphans of ours: `files/<project>/...` and `jobs/<job>/...`.
OWNERS: dict[str, type[Project] | type[Job]] = {"files": Project, "jobs": Job}
Row = type[File] | type[Checkpoint]


def expire_files(session: Session, *, limit: int = 100) -> list[str]:
    """Delete files past their `expires_after` that no open job and no model needs; their ids."""
    past = select(File).where(File.expires_at <= now(session), File.deleted_at.is_(None))
    # Locked first and checked afterwards, because a new job that uses the file locks it, too (`files.find_usable`).
    rows = session.scalars(past.order_by(File.expires_at).limit(limit).with_for_update(skip_locked=True)).all()
    gone = [file for file in rows if files.describe_use(session, file) is None]
    for file in gone:
        files.mark_deleted(session, file)
    session.flush()
    return [file.id for file in gone]


def delete_checkpoints(session: Session, *, days: float, limit: int = 100) -> list[str]:
    """Delete checkpoints of jobs that ended `days` ago; their names. The adapter stays."""
    old = (
        select(Checkpoint)
        .join(Job, Job.id == Checkpoint.job_id)
        .where(Checkpoint.deleted_at.is_(None), Job.finished_at < now(session) - timedelta(days=days))
        .limit(limit)
        .with_for_update(of=Checkpoint, skip_locked=True)
    )
    rows = session.scalars(old).all()
    for checkpoint in rows:
        checkpoints.mark_deleted(session, checkpoint)
    session.flush()
    return [checkpoint.name for checkpoint in rows]


def retire_jobs(session: Session, *, days: float, limit: int = 100) -> list[str]:
    """Delete checkpoints and result files of jobs that ended `days` ago; the ids of these jobs."""
    result = select(File.id).where(File.id == Job.result_file_id, File.deleted_at.is_(None))
    full = _select_long_ended(session, days).where(or_(_has_checkpoint(Checkpoint.deleted_at), result.exists()))
    rows = session.scalars(full.limit(limit).with_for_update(of=Job, skip_locked=True)).all()
    for job in rows:
        checkpoints.mark_all_deleted(session, job.id)
        if job.result_file_id is not None:
            session.get_one(File, job.result_file_id).deleted_at = now(session)
    session.flush()
    return [job.id for job in rows]


def remove_jobs(session: Session, *, days: float, limit: int = 10) -> list[str]:
    """Remove jobs that ended `days` ago and have nothing left, with their events and metrics; their ids.

    Here the bytes must be gone before the row, because only the row of a checkpoint names the bytes of its state.
    """
    empty = _select_long_ended(session, days).where(~_has_checkpoint(Checkpoint.cleared_at))
    rows = session.scalars(empty.limit(limit).with_for_update(of=Job, skip_locked=True)).all()
    gone = [job.id for job in rows]
    for table in (Metric, Event, Checkpoint, Adapter, JobLabel):  # first, because their rows refer to jobs
        session.execute(delete(table).where(table.job_id.in_(gone)))
    session.execute(delete(Job).where(Job.id.in_(gone)))
    return gone


def _select_long_ended(session: Session, days: float) -> Select[Job]:
    """Jobs that ended `days` ago and have no model that somebody may be using."""
    model = select(Adapter.job_id).where(Adapter.job_id == Job.id, Adapter.deleted_at.is_(None))
    return select(Job).where(Job.finished_at < now(session) - timedelta(days=days), ~model.exists())


def _has_checkpoint(without: InstrumentedAttribute[datetime | None]) -> ColumnElement[bool]:
    """True of jobs with a checkpoint that is not deleted, or not cleared, yet."""
    return select(Checkpoint.id).where(Checkpoint.job_id == Job.id, without.is_(None)).exists()


def find_uncleared(session: Session, kind: Row, *, limit: int = 100) -> list[tuple[str, str]]:
    """(row's id, key) of deleted rows whose bytes may still be there, longest deleted first."""
    key = File.storage_key if kind is File else Checkpoint.state_key
    query = select(kind.id, key).where(kind.deleted_at.is_not(None), kind.cleared_at.is_(None))
    return [(row_id, name) for row_id, name in session.execute(query.order_by(kind.deleted_at).limit(limit))]


def mark_cleared(session: Session, kind: Row, ids: Collection[str]) -> None:
    """The bytes of these rows are gone."""
    session.execute(
        update(kind)
        .where(kind.id.in_(ids))
        .values(cleared_at=now(session))
        .execution_options(synchronize_session=False)
    )


def find_unreferenced(session: Session, keys: Iterable[str]) -> set[str]:
    """Those keys that only deleted rows name, or none. A repeated upload may share its key with a deleted row."""
    wanted = set(keys)
    live = select(File.storage_key).where(File.storage_key.in_(wanted), File.deleted_at.is_(None))
    states = select(Checkpoint.state_key).where(Checkpoint.state_key.in_(wanted), Checkpoint.deleted_at.is_(None))
    return wanted - set(session.scalars(live)) - set(session.scalars(states))


def find_orphans(session: Session, keys: Sequence[str]) -> set[str]:
    """Those keys that no row names although this database knows their project or job.

    An object of an unknown project or job is never removed, because it belongs to another user of the bucket or to a
    database that was lost.
    """
    ours = find_owned(session, keys)
    return find_unreferenced(session, ours) if ours else set()


def find_owned(session: Session, keys: Sequence[str]) -> set[str]:
    """Those keys whose project or job this database knows."""
    return {key for prefix in OWNERS for key in _find_owned(session, prefix, keys)}


def _find_owned(session: Session, prefix: str, keys: Sequence[str]) -> list[str]:
    owners = {key: key.split("/")[1] for key in keys if key.startswith(f"{prefix}/") and key.count("/") > 1}
    table = OWNERS[prefix]
    known = set(session.scalars(select(table.id).where(table.id.in_(set(owners.values())))))
    return [key for key, owner in owners.items() if owner in known]
