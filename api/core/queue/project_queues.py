"""Project queues: the waiting jobs of one queue and one project, ordered by `priority_time` and id.

This module builds statements and runs none. A project queue is read from its first job on, with one index lookup
(`ix_jobs_project_queue`) for each job, so the cost of a statement does not depend on how many jobs wait. That is why
the statements are recursive: a window function would rank all waiting jobs.

Building such a statement takes longer than running it, so callers build it once. What changes from call to call are
parameters: `at`, a time, and `queue_0`, `queue_1` …
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeVar

from sqlalchemy import (
    CTE,
    ColumnElement,
    ScalarSelect,
    Select,
    SQLColumnExpression,
    bindparam,
    func,
    literal,
    or_,
    select,
    tuple_,
)
from sqlalchemy.orm import InstrumentedAttribute, aliased
from sqlalchemy.orm.util import AliasedClass

from api.core.db.database import UTCDateTime
from api.core.db.tables import Job, has_status

Row = type[Job] | AliasedClass[Job]
T = TypeVar("T")


def is_ready(job: Row) -> ColumnElement[bool]:
    """True of jobs that have no back-off to wait for at the time `at`."""
    return or_(job.not_before.is_(None), job.not_before <= bindparam("at", type_=UTCDateTime))


def queue_parameters(queues: Sequence[str]) -> dict[str, str]:
    """The parameters that name queues."""
    return {f"queue_{number}": name for number, name in enumerate(queues)}


def count_running(project_id: SQLColumnExpression[str]) -> ScalarSelect[int]:
    """How many jobs that project runs."""
    job = aliased(Job)
    return select(func.count()).where(has_status(job, "running"), job.project_id == project_id).scalar_subquery()


def count_before(job: Row, other: Row, *conditions: ColumnElement[bool], most: ColumnElement[int]) -> ScalarSelect[int]:
    """How many jobs are before `job` in its project queue and meet `conditions` on `other`; counts to `most`."""
    earlier = tuple_(other.priority_time, other.id) < tuple_(job.priority_time, job.id)
    found = select(other.id).where(has_status(other, "queued"), *_same_project_queue(other, job), earlier, *conditions)
    return select(func.count()).select_from(found.limit(most).correlate(job).subquery()).scalar_subquery()


@cache
def select_queues() -> Select[str | None]:
    """The queues in which a job waits, and a row without a name.

    Each step looks up the next name in the index, because DISTINCT would read all waiting jobs.
    """
    job = aliased(Job)
    lowest = select(func.min(job.queue).label("name")).where(has_status(job, "queued"))
    found = lowest.cte("queues", recursive=True)
    further = lowest.where(job.queue > found.c.name).correlate(found).scalar_subquery()
    return select(found.union_all(select(further).where(found.c.name.is_not(None))).c.name)


def select_heads(job: Row, *conditions: ColumnElement[bool], queues: int = 1) -> CTE:
    """The `id` of the first job of each project queue that meets `conditions` on `job`; the last may be NULL.

    Args:
        queues: how many queues, at least one.
    """
    previous = aliased(Job)

    def first(*where: ColumnElement[bool]) -> ScalarSelect[str]:
        found = select(job.id).where(has_status(job, "queued"), *where, *conditions)
        return found.order_by(job.project_id, job.priority_time, job.id).limit(1).correlate(previous).scalar_subquery()

    start, *others = (
        select(first(job.queue == bindparam(name)).label("id")) for name in queue_parameters([""] * queues)
    )
    found = start.cte("heads", recursive=True)
    following = first(job.queue == previous.queue, job.project_id > previous.project_id)
    return found.union_all(*others, select(following).join_from(found, previous, previous.id == found.c.id))


def select_following(
    job: Row,
    start: Select[str, str],
    *conditions: ColumnElement[bool],
    steps: Callable[[ColumnElement[str]], ColumnElement[int]],
) -> CTE:
    """The jobs behind each of `start` that meet `conditions`: `start`, `id`, `project_id`, `step`; `id` may be NULL.

    No table is joined, because PostgreSQL expects far too many rows of a recursion and would read the whole table.

    Args:
        start: ids and projects of jobs of the queue `queue_0`; they are step 0.
        steps: how many jobs to read of that project.
    """
    at = start.subquery()
    first = select(at.c[0].label("start"), at.c[0].label("id"), at.c[1].label("project_id"), literal(0).label("step"))
    found = first.cte("walk", recursive=True)
    priority_time = column_of(Job.priority_time, found)
    line = (job.queue == bindparam("queue_0"), job.project_id == found.c.project_id)
    later = select(job.id).where(
        has_status(job, "queued"), *line, tuple_(job.priority_time, job.id) > tuple_(priority_time, found.c.id)
    )
    following = later.where(*conditions).order_by(job.priority_time, job.id).limit(1).correlate(found).scalar_subquery()
    further = select(found.c.start, following, found.c.project_id, found.c.step + 1)
    goes_on = (found.c.id.is_not(None), found.c.step < steps(found.c.project_id))
    return found.union_all(further.where(*goes_on))


def column_of(column: InstrumentedAttribute[T], walk: CTE) -> ScalarSelect[T]:
    """The value of that column for the jobs of `select_following`."""
    return select(column).where(Job.id == walk.c.id).correlate(walk).scalar_subquery()


def _same_project_queue(job: Row, other: Row) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return job.queue == other.queue, job.project_id == other.project_id
