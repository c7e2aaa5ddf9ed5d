"""Which job is next: one order for the claim, for notifications and for the position that a caller is shown.

A job is due at `priority_time + step * slot`. `priority_time` is when it entered the queue, less one step for each
level of priority; `slot` counts the jobs that its project runs or has waiting before it, itself included. So one step
of waiting, one level of priority and one running job of the project weigh the same (`LORAINIT_PRIORITY_SECONDS`):
equal priorities take turns project by project, and whoever has waited long enough stands before everybody.
For each job that a project runs, its first waiting job is one step behind that of a new project.
"""

from collections.abc import Sequence
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, Double, Select, String, bindparam, func, literal, select
from sqlalchemy.orm import Session, aliased

from api.core.db.database import now
from api.core.db.tables import Job, Project, has_status
from api.core.errors import QuotaExceeded
from api.core.queue import project_queues
from api.core.settings import get_settings

NO_LIMIT = 2**62  # a number, so that the statement is the same with and without a limit
DEFAULT_QUEUE = "train"  # the queue of jobs that ask for no device


def queue_for_device(device: str) -> str:
    """The queue of jobs that ask for `device`: "any", a class of devices, or a queue's own name."""
    return DEFAULT_QUEUE if device == "any" else device


def device_for_queue(queue: str) -> str:
    """What a job of that queue asked for."""
    return "any" if queue == DEFAULT_QUEUE else queue


def compute_priority_time(at: datetime) -> ColumnElement[float]:
    """The `priority_time` of a job that enters the queue at `at`, in seconds since 1970."""
    return literal(at.timestamp(), Double) - Job.priority * literal(get_settings().priority_seconds, Double)


def lock_next_job(session: Session, queues: Sequence[str]) -> Job | None:
    """The queued job of these queues to start next, locked; those that other claims have locked are skipped."""
    passed = [""]  # not empty, because SQLAlchemy writes an empty list differently for IN and for NOT IN
    given = {"at": now(session), "passed": passed, **get_parameters(), **project_queues.queue_parameters(queues)}
    while (job_id := session.scalar(_select_best(len(queues)), given)) is not None:
        job = select(Job).where(Job.id == job_id, Job.status == "queued").with_for_update(skip_locked=True)
        if (found := session.scalar(job.execution_options(populate_existing=True))) is not None:
            return found
        passed.append(job_id)  # so that the next statement looks behind it, because another claim holds it
    return None


@cache
def _select_best(queues: int) -> Select[str]:
    """The id of the job that is due first. Only the first job of each project queue is read, or the next one if another
    claim has locked it."""
    job, ahead = aliased(Job), aliased(Job)
    passed = bindparam("passed", expanding=True, type_=String)
    heads = project_queues.select_heads(job, project_queues.is_ready(job), job.id.not_in(passed), queues=queues)
    before = select(func.count()).where(ahead.id.in_(passed), has_status(ahead, "queued"))
    mine = before.where(ahead.queue == Job.queue, ahead.project_id == Job.project_id).scalar_subquery()
    slot = project_queues.count_running(Job.project_id) + mine + 1
    waiting = select(Job.id).join(heads, heads.c.id == Job.id).where(slot <= LIMIT)
    return waiting.order_by(compute_due_time(Job.priority_time, slot, STEP), Job.id).limit(1)


# Settings as parameters, so that the statements are built once.
STEP, LIMIT = bindparam("step", type_=Double), bindparam("limit", type_=BigInteger)


def get_parameters() -> dict[str, float]:
    """The values of `STEP` (seconds for each slot) and `LIMIT` (the highest slot that may start)."""
    settings = get_settings()
    return {"step": settings.priority_seconds, "limit": settings.project_running or NO_LIMIT}


def compute_due_time(priority_time: Any, slot: Any, step: Any) -> Any:
    """When a job is due, in seconds since 1970; the earliest is next. Works for numbers and for columns."""
    return priority_time + slot * step


def find_held_back(session: Session, job_ids: Sequence[str], *, ready_at: datetime | None = None) -> set[str]:
    """Those of these queued jobs that their project's limit holds back.

    Args:
        ready_at: count only those jobs before them that have no back-off to wait for at this time.
    """
    if not get_settings().project_running:
        return set()
    given = {"at": ready_at, "ids": job_ids, **get_parameters()}
    return set(session.scalars(_select_held_back(ready_at is not None), given))


@cache
def _select_held_back(ready: bool) -> Select[str]:
    other = aliased(Job)
    conditions = (project_queues.is_ready(other),) if ready else ()
    slot = (
        project_queues.count_running(Job.project_id)
        + project_queues.count_before(Job, other, *conditions, most=LIMIT)
        + 1
    )
    return select(Job.id).where(Job.id.in_(bindparam("ids", expanding=True, type_=String)), slot > LIMIT)


def count_startable(session: Session, project_id: str, *, wanted: int) -> int:
    """How many of `wanted` jobs the project may start now. Its other claims wait for the commit, so that two of them
    cannot exceed the limit together.
    """
    limit = get_settings().project_running
    if not limit:
        return wanted
    lock_project(session, project_id)
    running = select(func.count()).where(Job.project_id == project_id, has_status(Job, "running"))
    return min(wanted, limit - (session.scalar(running) or 0))


def require_queue_quota(session: Session, project_id: str, *, adding: int = 1) -> None:
    """Refuse `adding` more waiting jobs of a project if it would have more than it may.

    Raises:
        QuotaExceeded: more than `LORAINIT_PROJECT_QUEUED` of them would wait.
    """
    limit = get_settings().project_queued
    if not limit:
        return
    lock_project(session, project_id)
    waiting = (Job.status.in_(("validating_files", "queued", "paused")), Job.finished_at.is_(None))
    count = session.scalar(select(func.count()).where(Job.project_id == project_id, *waiting)) or 0
    if count + adding > limit:
        more = "" if adding == 1 else f", {adding} more are asked for"
        message = (
            f"{count} jobs of this project are waiting{more}, and {limit} may. Wait for one to start, or cancel one."
        )
        raise QuotaExceeded(message, code="queue_full")


def lock_project(session: Session, project_id: str) -> None:
    """Lock the project's row, so that no other transaction counts its jobs until the commit.

    `key_share` still lets other transactions insert rows that refer to the project.
    """
    session.execute(select(Project.id).where(Project.id == project_id).with_for_update(key_share=True))
