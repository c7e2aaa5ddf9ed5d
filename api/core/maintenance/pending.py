"""Whether there is work for the reconciler: one short query for all chores. Each chore then finds its own work."""

from functools import lru_cache
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Dialect, Exists, Select, SQLColumnExpression, func, or_, select

from api.core.db.database import UTCDateTime
from api.core.db.tables import Checkpoint, File, Job, has_status
from api.core.files import validation


class PendingWork(NamedTuple):
    """For each kind of work, whether there is any."""

    lost: bool  # runs whose lease is over
    validating: bool  # jobs whose files are not known to be good
    queued: bool  # jobs, so workers may have to be notified
    unwritten: bool  # ended jobs whose numbers wait to become their result file
    unchecked: bool  # files that no reconciler checks now
    experiments: bool  # with a job that has changed its status
    uncleared: bool  # deleted files and checkpoints whose bytes may still be there


def find_pending(connection: Connection) -> PendingWork:
    """One statement, which reads only partial indexes.

    It goes to the driver directly, because SQLAlchemy would take several times as long as the query, and two queries a
    second are most of the work of an idle service. After an error, the next call opens a new connection.
    """
    try:
        driver: Any = connection.connection.driver_connection
        (found,) = driver.execute(_text(connection.dialect)).fetchall()
    except Exception:
        connection.invalidate()  # because SQLAlchemy does not see errors of calls that bypass it
        raise
    return PendingWork(*map(bool, found))


@lru_cache(maxsize=4)  # one is enough: a process has one database
def _text(dialect: Dialect) -> str:
    statement = _look(dialect.name == "postgresql")
    return str(statement.compile(dialect=dialect, compile_kwargs={"literal_binds": True}))


def _look(postgres: bool) -> Select[bool, bool, bool, bool, bool, bool, bool]:
    # SQLite keeps times as text.
    at = func.now() if postgres else func.strftime("%Y-%m-%d %H:%M:%f", "now", type_=UTCDateTime)
    deleted = (_some(kind.id, kind.deleted_at.is_not(None), kind.cleared_at.is_(None)) for kind in (File, Checkpoint))
    return select(
        _some(Job.id, has_status(Job, "running"), Job.lease_until < at),
        _some(Job.id, has_status(Job, "validating_files"), Job.finished_at.is_(None)),
        _some(Job.id, has_status(Job, "queued")),
        _some(Job.id, Job.csv_due.is_not(None)),
        _some(File.id, *validation.unclaimed_conditions(at)),
        _some(Job.id, Job.experiment_due.is_not(None)),
        or_(*deleted),
    )


def _some(column: SQLColumnExpression[Any], *conditions: ColumnElement[bool]) -> Exists:
    return select(column).where(*conditions).exists()
