"""Which queued jobs the workers still have to be told of, and in which queue. Nothing here commits.

A message wakes a worker and does not say which job is taken (`api.core.queue.scheduling`). So every job that could
start needs one message in its queue. A job that a limit or a back-off holds back needs none before that is over,
because a worker that is woken and finds nothing to do forgets the message.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Select, SQLColumnExpression, bindparam, case, func, select, update
from sqlalchemy.orm import Session, aliased

from api.core.db.database import UTCDateTime, now
from api.core.db.tables import Job, has_status
from api.core.queue import project_queues, scheduling, workers
from api.core.settings import get_settings

MOST = 100  # bells of a queue at a time


class Bell(NamedTuple):
    """Which job to ring for, and where."""

    job_id: str
    queue: str


def unannounced(session: Session) -> list[Bell]:
    """For jobs that could start and were never rung for; at most a hundred of each queue."""
    waited_in = [name for name in session.scalars(project_queues.queues()) if name is not None]
    return _bells(session, waited_in, rung_before=None, most=MOST)


def unheard(session: Session, *, patience: timedelta) -> list[Bell]:
    """For jobs to ring again: rung long ago while a living worker of their queue has a free slot.

    A message that waits behind busy workers is not lost, so nothing is rung while all are busy; the number of free
    slots bounds how many of a queue are rung. Jobs trained together have one owner and fill one slot.
    """
    owners = select(func.count(Job.lease_owner.distinct())).where(has_status(Job, "running"))
    free = workers.free_slots(session, running=session.scalar(owners) or 0)
    if not free:
        return []
    served = sorted(workers.served(session))
    return _bells(session, served, rung_before=now(session) - patience, most=min(free, MOST))


def bell(session: Session, job_id: str) -> Bell | None:
    """For one job; None if it has been rung for, or while it could not start anyway."""
    at = now(session)
    waits = (Job.id == job_id, has_status(Job, "queued"), Job.rung_at.is_(None), project_queues.ready(Job))
    found = session.execute(select(Job.id, Job.queue).where(*waits), {"at": at}).one_or_none()
    return None if found is None or scheduling.held(session, [job_id], ready_at=at) else Bell(*found)


def mark_rung(session: Session, job_id: str) -> None:
    """Remember that the doorbell was rung for a job."""
    session.execute(
        update(Job)
        .where(Job.id == job_id, Job.status == "queued")
        .values(rung_at=now(session))
        .execution_options(synchronize_session=False)
    )


def _bells(session: Session, queues: Sequence[str], *, rung_before: datetime | None, most: int) -> list[Bell]:
    """Of each queue at most so many, who has waited longest for a bell first."""
    given = {"at": now(session), "rung_before": rung_before, "most": most, **scheduling.weights()}
    wanted = _wanted(never=rung_before is None, limited=bool(get_settings().project_running))
    return [Bell(job_id, q) for q in queues for job_id in session.scalars(wanted, given | project_queues.named([q]))]


@cache
def _wanted(*, never: bool, limited: bool) -> Select[str]:
    """Ids of the jobs of a queue that could start and whose bell was rung `never`, or before a time."""
    job_id, rung_at, turn, conditions = _within_limit() if limited else _any()
    rung = rung_at.is_(None) if never else rung_at < bindparam("rung_before", type_=UTCDateTime)
    return select(job_id).where(*conditions, rung).order_by(rung_at, turn, job_id).limit(bindparam("most"))


_Column = SQLColumnExpression[Any]
_Waiting = tuple[_Column, _Column, _Column, list[ColumnElement[bool]]]  # id, rung_at and turn of jobs, conditions


def _any() -> _Waiting:
    waits = [has_status(Job, "queued"), Job.queue == bindparam("queue_0"), project_queues.ready(Job)]
    return Job.id, Job.rung_at, Job.turn, waits


def _within_limit() -> _Waiting:
    """The first jobs of each line, as many as the limit lets its project start, at most `MOST`."""
    job, head, limit = aliased(Job), aliased(Job), scheduling.LIMIT
    heads = project_queues.heads(job, project_queues.ready(job))
    start = select(head.id, head.project_id).join(heads, heads.c.id == head.id)
    start = start.where(project_queues.running(head.project_id) < limit)
    most = case((limit < MOST, limit), else_=MOST)
    walk = project_queues.walk(
        job, start, project_queues.ready(job), steps=lambda project_id: most - 1 - project_queues.running(project_id)
    )
    return (
        walk.c.id,
        project_queues.value(Job.rung_at, walk),
        project_queues.value(Job.turn, walk),
        [walk.c.id.is_not(None)],
    )
