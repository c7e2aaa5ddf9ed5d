"""Keyset pages in the order (time, id), so that new rows never shift a later page.

A cursor stays valid when its row is deleted, because deleted rows stay in the table and are only marked.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Select, tuple_
from sqlalchemy.orm import Session

from api.core.db.tables import ApiKey, Experiment, File, Job
from api.core.errors import InvalidValue

R = TypeVar("R", ApiKey, Experiment, File, Job)
Query = TypeVar("Query", bound=Select[Any])
Found = TypeVar("Found")


def read_page(
    session: Session,
    query: Select[R],
    table: type[R],
    *,
    project_id: str,
    after: str | None,
    limit: int,
    descending: bool = True,
) -> tuple[Sequence[R], bool]:
    """`limit` rows of `query` after the row `after`; True when there are more.

    Raises:
        InvalidValue: `after` is no row of this project.
    """
    query = order_after(session, query, table, project_id=project_id, after=after, descending=descending)
    return split_page(session.scalars(query.limit(limit + 1)).all(), limit)


def order_after(
    session: Session,
    query: Query,
    table: type[R],
    *,
    project_id: str,
    after: str | None,
    descending: bool = True,
    position: Sequence[Any] | None = None,
) -> Query:
    """`query` in order, starting behind the row `after`.

    Args:
        position: the columns that order the rows of `query`; None = the time and the id of `table`.

    Raises:
        InvalidValue: `after` is no row of this project.
    """
    position = position or [table.created_at, table.id]
    if after is not None:
        cursor = session.get(table, after)
        if cursor is None or cursor.project_id != project_id:
            raise unknown_cursor(after)
        query = query.where(_is_beyond(position, cursor, descending=descending))
    return query.order_by(*(column.desc() if descending else column.asc() for column in position))


def split_page(rows: Sequence[Found], limit: int) -> tuple[Sequence[Found], bool]:
    """At most `limit` of these rows; True when there are more. A query asks for one row more, so that this is known."""
    return rows[:limit], len(rows) > limit


def unknown_cursor(after: str) -> InvalidValue:
    """The error for a cursor that is malformed or another project's: the same one, so that ids cannot be probed."""
    return InvalidValue(f"after: {after!r} is no position in this list.", code="invalid_value", param="after")


def _is_beyond(position: Sequence[Any], cursor: R, *, descending: bool) -> ColumnElement[bool]:
    # Compared as pairs, because databases look these up in an index; for `a OR (b AND c)` they read from the start.
    here, there = tuple_(*position), (cursor.created_at, cursor.id)
    return here < there if descending else here > there
