"""Which workers are alive: a row each, renewed every ten seconds."""

from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from api.core.db import now
from api.core.models import Worker

FRESH = timedelta(seconds=30)


def say_alive(session: Session, worker_id: str, *, slots: int, queues: Sequence[str], started_at: datetime) -> None:
    """Renew this worker's row and drop the rows of workers gone for an hour."""
    at = now(session)
    session.merge(Worker(id=worker_id, slots=slots, queues=list(queues), started_at=started_at, seen_at=at))
    session.execute(delete(Worker).where(Worker.seen_at < at - timedelta(hours=1)))


def online(session: Session) -> int:
    """How many workers have been heard of lately."""
    return session.scalar(select(func.count()).where(Worker.seen_at >= now(session) - FRESH)) or 0


def served(session: Session) -> set[str]:
    """The queues that some living worker takes jobs from."""
    living = session.scalars(select(Worker.queues).where(Worker.seen_at >= now(session) - FRESH))
    return {queue for queues in living for queue in queues}


def free_slots(session: Session, *, running: int) -> int:
    """Slots of living workers that run nothing."""
    slots = session.scalar(select(func.sum(Worker.slots)).where(Worker.seen_at >= now(session) - FRESH)) or 0
    return max(0, slots - running)
