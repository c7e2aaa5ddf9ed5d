"""A job's events, numbered 1, 2, 3 ... without gaps, so that a reader who has number n has all before it.

Functions take a session, never commit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Row, insert, select, update
from sqlalchemy.orm import Session

from api.core.db.tables import FINAL_STATUSES, Event, Job
from api.core.errors import InvalidValue
from api.core.ids import new_event_id
from api.core.monitoring import counters

Level = Literal["info", "warn", "error"]
# The columns that callers see. They are read as plain columns, because loading an `Event` takes twice as long.
ShownEvent = Row[tuple[str, datetime, str, str, str, dict[str, Any], int]]
_SHOWN = (Event.id, Event.created_at, Event.level, Event.message, Event.type, Event.data, Event.sequence)


@dataclass(frozen=True)
class EventDraft:
    """The content of one event. Its id is made before it is written, so that a writer can find out whether it was."""

    message: str
    level: Level = "info"
    type: Literal["message", "metrics"] = "message"
    data: dict[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=new_event_id)


def append(
    session: Session,
    job_id: str,
    message: str,
    *,
    at: datetime,
    level: Level = "info",
    data: dict[str, Any] | None = None,
) -> None:
    """Add one event: see `append_all`."""
    append_all(session, job_id, [EventDraft(message, level=level, data=data or {})], at=at)


def append_all(session: Session, job_id: str, lines: Sequence[EventDraft], *, at: datetime) -> None:
    """Add events in this order. The counter's row lock orders writers, so sequences have no gap.

    The caller has the right to write, because it has just changed the job's row in this transaction.
    """
    if not lines:
        return
    count = Job.event_count + len(lines)
    taken = update(Job).where(Job.id == job_id).values(event_count=count).returning(Job.event_count)
    last = session.execute(taken.execution_options(synchronize_session=False)).scalar_one()
    rows = [
        {"job_id": job_id, "sequence": sequence, "created_at": at, **vars(line)}
        for sequence, line in enumerate(lines, start=last - len(lines) + 1)
    ]
    session.execute(insert(Event), rows)


def find_written(session: Session, lines: Sequence[EventDraft]) -> set[str]:
    """The ids of those of these events that are in the database, so that none is written twice after a lost commit."""
    return set(session.scalars(select(Event.id).where(Event.id.in_([line.id for line in lines]))))


def append_status_event(
    session: Session,
    job_id: str,
    message: str,
    *,
    at: datetime,
    status: str,
    previous: str | None,
    level: Level = "info",
    **data: Any,
) -> None:
    """Append the event that every status change has.

    The end of a job is counted here, because this runs once in the transaction of each change (docs/decisions/0018).
    """
    payload = {"kind": "status", "status": status, "previous": previous, **data}
    append(session, job_id, message, at=at, level=level, data=payload)
    if status in FINAL_STATUSES:
        counters.count_ended_job(session, job_id, status=status, code=(data.get("error") or {}).get("code", ""))


def list_page(session: Session, job_id: str, *, after: str | None, limit: int) -> tuple[Sequence[ShownEvent], bool]:
    """Newest first, `limit` of them after the event `after`; True when there are more."""
    query = select(*_SHOWN).where(Event.job_id == job_id).order_by(Event.sequence.desc()).limit(limit + 1)
    if after is not None:
        cursor = session.get(Event, after)
        if cursor is None or cursor.job_id != job_id:
            raise InvalidValue(f"after {after!r} is not an event of this job.", code="invalid_value", param="after")
        query = query.where(Event.sequence < cursor.sequence)
    rows = session.execute(query).all()
    return rows[:limit], len(rows) > limit


def list_since(session: Session, job_id: str, sequence: int, *, limit: int) -> Sequence[ShownEvent]:
    """Oldest first, `limit` of those after number `sequence`."""
    query = select(*_SHOWN).where(Event.job_id == job_id, Event.sequence > sequence)
    return session.execute(query.order_by(Event.sequence).limit(limit)).all()


def find_sequence(session: Session, job_id: str, event_id: str | None) -> int:
    """The sequence of an event of this job; 0, which is before the first, for any other id.

    An unknown id is no error, because a client that reconnects with it should get all events instead of none.
    """
    event = session.get(Event, event_id) if event_id else None
    return event.sequence if event is not None and event.job_id == job_id else 0
