"""Is there anything for the reconciler to do? One short look for all of its chores, which find for themselves what."""

from datetime import UTC, datetime
from functools import cache
from typing import NamedTuple

from sqlalchemy import ColumnElement, Connection, Exists, Select, SQLColumnExpression, bindparam, func, or_, select

from api.core import validation
from api.core.db import UTCDateTime
from api.core.models import Checkpoint, File, Job, has_status


class Due(NamedTuple):
    """Whether there are some."""

    lost: bool  # runs whose lease is over
    validating: bool  # jobs whose files are not known to be good
    queued: bool  # jobs, and so bells that may have to be rung
    unwritten: bool  # ended jobs whose numbers wait to become their result file
    unchecked: bool  # files that nobody checks now
    uncleared: bool  # deleted files and checkpoints whose bytes may still be there


def look(connection: Connection) -> Due:
    """One statement, by indexes that hold nothing else."""
    postgres = connection.dialect.name == "postgresql"
    given = {} if postgres else {"at": datetime.now(UTC)}
    return Due(*connection.execute(_look(postgres), given).one())


@cache
def _look(postgres: bool) -> Select[bool, bool, bool, bool, bool, bool]:
    at = func.now() if postgres else bindparam("at", type_=UTCDateTime)
    deleted = (_some(kind.id, kind.deleted_at.is_not(None), kind.cleared_at.is_(None)) for kind in (File, Checkpoint))
    return select(
        _some(Job.id, has_status(Job, "running"), Job.lease_until < at),
        _some(Job.id, has_status(Job, "validating_files"), Job.finished_at.is_(None)),
        _some(Job.id, has_status(Job, "queued")),
        _some(Job.id, Job.csv_due.is_not(None)),
        _some(File.id, *validation.unclaimed(at)),
        or_(*deleted),
    )


def _some(column: SQLColumnExpression[str], *conditions: ColumnElement[bool]) -> Exists:
    return select(column).where(*conditions).exists()
