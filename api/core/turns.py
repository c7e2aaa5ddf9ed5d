"""Whose turn it is: one order for the claim, for the doorbell and for the place that a caller is shown.

A job is due at `turn + step * slot`. `turn` is when it entered the queue, less one step for each level of
priority; `slot` counts the jobs that its project runs or has waiting before it, itself included. So one step
of waiting, one level of priority and one running job of the project weigh the same (`LORAINIT_PRIORITY_SECONDS`):
equal priorities take turns project by project, and whoever has waited long enough stands before everybody.
The first job of a project is never more than its running jobs' worth of steps behind a newcomer's.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import ColumnElement, Double, Subquery, func, literal, or_, select, true
from sqlalchemy.orm import Session

from api.core.db import now
from api.core.errors import QuotaExceeded
from api.core.models import Job, Project
from api.core.settings import get_settings


class Bell(NamedTuple):
    """Which job to ring for, and where."""

    job_id: str
    queue: str


ANY = "train"  # the queue of jobs that say nothing of a device


def queue_of(device: str) -> str:
    """The queue of jobs that ask for `device`: "any", a class of devices, or a queue's own name."""
    return ANY if device == "any" else device


def device_of(queue: str) -> str:
    """What a job of that queue asked for."""
    return "any" if queue == ANY else queue


def new_turn(at: datetime) -> ColumnElement[float]:
    """The turn of a job that enters the queue at `at`, in seconds since 1970."""
    return literal(at.timestamp(), Double) - Job.priority * literal(get_settings().priority_seconds, Double)


def line(*conditions: ColumnElement[bool]) -> Subquery:
    """Queued jobs that meet `conditions`, with their `queue`, `slot` and `due`; projects are ranked queue by queue."""
    busy = (
        select(Job.project_id, func.count().label("jobs")).where(Job.status == "running").group_by(Job.project_id)
    ).subquery()
    rank = func.row_number().over(partition_by=(Job.project_id, Job.queue), order_by=(Job.turn, Job.id))
    slot = (func.coalesce(busy.c.jobs, 0) + rank).label("slot")
    ranked = (
        select(Job.id, Job.queue, Job.turn, slot)
        .outerjoin(busy, busy.c.project_id == Job.project_id)
        .where(Job.status == "queued", *conditions)
        .subquery()
    )
    due = ranked.c.turn + ranked.c.slot * literal(get_settings().priority_seconds, Double)
    return select(ranked.c.id, ranked.c.queue, ranked.c.slot, due.label("due")).subquery()


def ready(at: datetime) -> ColumnElement[bool]:
    """True of jobs that wait for no back-off."""
    return or_(Job.not_before.is_(None), Job.not_before <= at)


def within_limit(line: Subquery) -> ColumnElement[bool]:
    """True of jobs that may run beside those that their project runs or has waiting before them."""
    limit = get_settings().project_running
    return line.c.slot <= limit if limit else true()


def first(session: Session, queues: Sequence[str]) -> Job | None:
    """The queued job of these queues to start next, locked; those that others are taking are passed over."""
    ranked = line(ready(now(session)), Job.queue.in_(queues))
    return session.scalar(
        select(Job)
        .join(ranked, ranked.c.id == Job.id)
        .where(Job.status == "queued", within_limit(ranked))
        .order_by(ranked.c.due, Job.id)
        .limit(1)
        .with_for_update(of=Job, skip_locked=True)
        .execution_options(populate_existing=True)
    )


def room(session: Session, project_id: str, *, wanted: int) -> int:
    """How many of `wanted` jobs the project may start now; its other claims wait until this one commits."""
    limit = get_settings().project_running
    if not limit:
        return wanted
    hold(session, project_id)
    running = select(func.count()).where(Job.project_id == project_id, Job.status == "running")
    return min(wanted, limit - (session.scalar(running) or 0))


def check_room(session: Session, project_id: str) -> None:
    """Refuse one more waiting job of a project that has as many as it may.

    Raises:
        QuotaExceeded: `LORAINIT_PROJECT_QUEUED` of them wait already.
    """
    limit = get_settings().project_queued
    if not limit:
        return
    hold(session, project_id)
    waiting = Job.status.in_(("validating_files", "queued", "paused"))
    count = session.scalar(select(func.count()).where(Job.project_id == project_id, waiting)) or 0
    if count >= limit:
        message = f"{count} jobs of this project are waiting, and {limit} may. Wait for one to start, or cancel one."
        raise QuotaExceeded(message, code="queue_full")


def hold(session: Session, project_id: str) -> None:
    """Let nobody else count this project's jobs until the commit; new rows may refer to it all the same."""
    session.execute(select(Project.id).where(Project.id == project_id).with_for_update(key_share=True))


def bells(session: Session, *conditions: ColumnElement[bool], limit: int = 100) -> list[Bell]:
    """For jobs that could start if a worker came, most urgent first."""
    ranked = line(ready(now(session)))
    rows = session.execute(
        select(Job.id, Job.queue)
        .join(ranked, ranked.c.id == Job.id)
        .where(within_limit(ranked), *conditions)
        .order_by(ranked.c.due, Job.id)
        .limit(limit)
    )
    return [Bell(*row) for row in rows]
