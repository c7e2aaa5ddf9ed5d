"""Finds the queued jobs for which the workers of a queue still need a message. Nothing here commits.

A message wakes a worker and does not decide which job it takes (`api.core.queue.scheduling`). So every job that could
start needs one message in its queue. A job that waits for a limit or a back-off needs none until that is over,
because a worker that finds nothing to do drops the message.
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

MOST = 100  # notifications of a queue at a time, so that one call does not take long


class Notification(NamedTuple):
    """A message that is due: it goes to the workers of `queue` and names a job that could start."""

    job_id: str
    queue: str


def find_unannounced(session: Session) -> list[Notification]:
    """Notifications for jobs that could start and have had none yet; at most a hundred for each queue."""
    waited_in = [name for name in session.scalars(project_queues.select_queues()) if name is not None]
    return _find_notifications(session, waited_in, notified_before=None, most=MOST)


def find_lost(session: Session, *, older_than: timedelta) -> list[Notification]:
    """Notifications for jobs whose message was probably lost: it is old, and a worker of their queue has a free slot.

    A message that waits behind busy workers is not lost, so nothing is sent again while all are busy, and for each
    queue no more than there are free slots. Jobs trained together have one owner and fill one slot.
    """
    owners = select(func.count(Job.lease_owner.distinct())).where(has_status(Job, "running"))
    free = workers.count_free_slots(session, running=session.scalar(owners) or 0)
    if not free:
        return []
    served = sorted(workers.find_served_queues(session))
    return _find_notifications(session, served, notified_before=now(session) - older_than, most=min(free, MOST))


def find_notification(session: Session, job_id: str) -> Notification | None:
    """The notification for one job; None if it has had one, or if the job could not start now."""
    at = now(session)
    waits = (Job.id == job_id, has_status(Job, "queued"), Job.notified_at.is_(None), project_queues.is_ready(Job))
    found = session.execute(select(Job.id, Job.queue).where(*waits), {"at": at}).one_or_none()
    return None if found is None or scheduling.find_held_back(session, [job_id], ready_at=at) else Notification(*found)


def mark_notified(session: Session, job_id: str) -> None:
    """Remember that a message was sent for a job."""
    session.execute(
        update(Job)
        .where(Job.id == job_id, Job.status == "queued")
        .values(notified_at=now(session))
        .execution_options(synchronize_session=False)
    )


def _find_notifications(
    session: Session, queues: Sequence[str], *, notified_before: datetime | None, most: int
) -> list[Notification]:
    """At most `most` for each queue. Jobs whose last message is the oldest come first."""
    given = {"at": now(session), "notified_before": notified_before, "most": most, **scheduling.get_parameters()}
    wanted = _select_startable(never=notified_before is None, limited=bool(get_settings().project_running))
    return [
        Notification(job_id, q)
        for q in queues
        for job_id in session.scalars(wanted, given | project_queues.queue_parameters([q]))
    ]


@cache
def _select_startable(*, never: bool, limited: bool) -> Select[str]:
    """Ids of the jobs of a queue that could start and were notified `never`, or before a time."""
    job_id, notified_at, priority_time, conditions = (
        _describe_startable_within_limit() if limited else _describe_startable()
    )
    notified = notified_at.is_(None) if never else notified_at < bindparam("notified_before", type_=UTCDateTime)
    return (
        select(job_id)
        .where(*conditions, notified)
        .order_by(notified_at, priority_time, job_id)
        .limit(bindparam("most"))
    )


_Column = SQLColumnExpression[Any]
_Waiting = tuple[_Column, _Column, _Column, list[ColumnElement[bool]]]  # id, notified_at, priority_time, conditions


def _describe_startable() -> _Waiting:
    waits = [has_status(Job, "queued"), Job.queue == bindparam("queue_0"), project_queues.is_ready(Job)]
    return Job.id, Job.notified_at, Job.priority_time, waits


def _describe_startable_within_limit() -> _Waiting:
    """The first jobs of each project queue: as many as the limit lets the project start, at most `MOST`."""
    job, head, limit = aliased(Job), aliased(Job), scheduling.LIMIT
    heads = project_queues.select_heads(job, project_queues.is_ready(job))
    start = select(head.id, head.project_id).join(heads, heads.c.id == head.id)
    start = start.where(project_queues.count_running(head.project_id) < limit)
    most = case((limit < MOST, limit), else_=MOST)
    walk = project_queues.select_following(
        job,
        start,
        project_queues.is_ready(job),
        steps=lambda project_id: most - 1 - project_queues.count_running(project_id),
    )
    return (
        walk.c.id,
        project_queues.column_of(Job.notified_at, walk),
        project_queues.column_of(Job.priority_time, walk),
        [walk.c.id.is_not(None)],
    )
