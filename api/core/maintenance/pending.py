"""Is there anything for the reconciler to do? One short look for all of its chores, which find for themselves what."""

from functools import lru_cache
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Dialect, Exists, Select, SQLColumnExpression, func, or_, select

from api.core.db.database import UTCDateTime
from api.core.db.tables import Checkpoint, File, Job, has_status
from api.core.files import validation


class PendingWork(NamedTuple):
    """Whether there are some."""

    lost: bool  # runs whose lease is over
    validating: bool  # jobs whose files are not known to be good
    queued: bool  # jobs, so workers may have to be notified
    unwritten: bool  # ended jobs whose numbers wait to become their result file
    unchecked: bool  # files that no reconciler checks now
    uncleared: bool  # deleted files and checkpoints whose bytes may still be there


def find_pending(connection: Connection) -> PendingWork:
    """One statement, by indexes that hold nothing else.

    The driver is asked, since SQLAlchemy around it costs several times the look: two of them a second are most of what
    a service costs that nobody uses. A connection on which that went wrong is made anew by the next look.
    """
    try:
        driver: Any = connection.connection.driver_connection
        (found,) = driver.execute(_text(connection.dialect)).fetchall()
    except Exception:
        connection.invalidate()  # SQLAlchemy does not hear what goes wrong with the driver
        raise
    return PendingWork(*map(bool, found))


@lru_cache(maxsize=4)  # a process has one
def _text(dialect: Dialect) -> str:
    statement = _look(dialect.name == "postgresql")
    return str(statement.compile(dialect=dialect, compile_kwargs={"literal_binds": True}))


def _look(postgres: bool) -> Select[bool, bool, bool, bool, bool, bool]:
    # SQLite keeps times as text.
    at = func.now() if postgres else func.strftime("%Y-%m-%d %H:%M:%f", "now", type_=UTCDateTime)
    deleted = (_some(kind.id, kind.deleted_at.is_not(None), kind.cleared_at.is_(None)) for kind in (File, Checkpoint))
    return select(
        _some(Job.id, has_status(Job, "running"), Job.lease_until < at),
        _some(Job.id, has_status(Job, "validating_files"), Job.finished_at.is_(None)),
        _some(Job.id, has_status(Job, "queued")),
        _some(Job.id, Job.csv_due.is_not(None)),
        _some(File.id, *validation.unclaimed_conditions(at)),
        or_(*deleted),
    )


def _some(column: SQLColumnExpression[str], *conditions: ColumnElement[bool]) -> Exists:
    return select(column).where(*conditions).exists()
