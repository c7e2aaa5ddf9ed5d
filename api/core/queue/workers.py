"""Which workers are alive. Each has a row that it renews every ten seconds."""

from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from api.core.db.database import now
from api.core.db.tables import Worker

FRESH = timedelta(seconds=30)  # three heartbeats, because one may be late or fail


def record_heartbeat(
    session: Session,
    worker_id: str,
    *,
    slots: int,
    queues: Sequence[str],
    started_at: datetime,
    problem: str | None = None,
) -> None:
    """Renew this worker's row and drop the rows of workers gone for an hour.

    Args:
        slots: how many slots take jobs.
        problem: why the others do not.
    """
    at = now(session)
    row = Worker(id=worker_id, slots=slots, queues=list(queues), started_at=started_at, seen_at=at, problem=problem)
    session.merge(row)
    session.execute(delete(Worker).where(Worker.seen_at < at - timedelta(hours=1)))


def count_online(session: Session) -> int:
    """How many workers have sent a heartbeat lately."""
    return session.scalar(select(func.count()).where(Worker.seen_at >= now(session) - FRESH)) or 0


def find_problems(session: Session) -> dict[str, str]:
    """Why living workers take no job, or not in all their slots."""
    at_work = select(Worker.id, Worker.problem).where(Worker.seen_at >= now(session) - FRESH)
    return {name: why for name, why in session.execute(at_work.order_by(Worker.id)) if why}


def find_served_queues(session: Session) -> set[str]:
    """The queues that some living worker takes jobs from."""
    living = session.scalars(select(Worker.queues).where(Worker.seen_at >= now(session) - FRESH))
    return {queue for queues in living for queue in queues}


def count_free_slots(session: Session, *, running: int) -> int:
    """Slots of living workers that run nothing."""
    slots = session.scalar(select(func.sum(Worker.slots)).where(Worker.seen_at >= now(session) - FRESH)) or 0
    return max(0, slots - running)
