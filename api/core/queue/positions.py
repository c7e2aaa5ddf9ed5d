"""Positions in the queue: computed for all callers at once, at most once a second, for the first hundred of a queue.

Ranking takes about ten times as long as the rest of a poll, and all callers who poll ask for the same order. So the
positions that they see may be a second old. A claim does not use them (`api.core.queue.scheduling`).
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from heapq import nsmallest
from itertools import chain
from math import inf
from typing import NamedTuple
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine, Integer, Select, String, bindparam, select
from sqlalchemy.orm import Session, aliased

from api.core.db.database import now
from api.core.db.tables import Job, ShownJob
from api.core.queue import project_queues, scheduling, workers
from api.core.settings import get_settings

MOST = 100  # jobs further behind all have the next number, because ranking all of a long queue takes too long
MAX_AGE_SECONDS = 1.0  # not more, so that a caller who polls every second sees the queue move
_AT_ANY_TIME = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True)
class QueuePosition:
    """The position of a queued job (`MOST` + 1 for all that are further behind), and why it is not running."""

    position: int
    reason: str


class OrderEntry(NamedTuple):
    """A job's position among all that wait for the same workers, and whether its project's limit lets it start."""

    position: int
    allowed: bool


@dataclass(frozen=True)
class QueueOrder:
    """The first jobs of every queue by id, and the queues in which more wait than these."""

    entries: dict[str, OrderEntry] = field(default_factory=dict)
    truncated: set[str] = field(default_factory=set)

    def covers(self, job: ShownJob) -> bool:
        """Whether a job that waits would be here if it were among the first."""
        return job.id in self.entries or job.queue in self.truncated


def find_positions(session: Session, queued: Sequence[ShownJob]) -> dict[str, QueuePosition]:
    """The positions of these jobs by id. A job that has left the queue meanwhile has none."""
    if not queued:
        return {}
    cache = _get_cache(session)
    order = cache.order(queued, lambda: read_order(session))
    entries = {job.id: order.entries[job.id] for job in queued if job.id in order.entries}
    behind = [job.id for job in queued if job.id not in entries and job.queue in order.truncated]
    held_back = scheduling.find_held_back(session, behind) if behind else set()
    entries |= {job_id: OrderEntry(MOST + 1, job_id not in held_back) for job_id in behind}
    served = cache.served(lambda: workers.find_served_queues(session))
    at = now(session) if any(job.not_before is not None for job in queued) else _AT_ANY_TIME
    return {job.id: _make_position(job, entries[job.id], at=at, served=served) for job in queued if job.id in entries}


def _make_position(job: ShownJob, entry: OrderEntry, *, at: datetime, served: set[str]) -> QueuePosition:
    waits = job.not_before is not None and job.not_before > at
    if job.queue not in served:
        reason = "no_worker_for_device"
    elif job.attempts or job.lost_runs or waits:
        reason = "restarting"
    elif not entry.allowed:
        reason = "project_limit_reached"
    else:
        reason = "waiting_for_gpu" if entry.position == 1 else "waiting_for_turn"
    return QueuePosition(entry.position, reason)


def read_order(session: Session) -> QueueOrder:
    """The order as it is now."""
    limit, found = get_settings().project_running, QueueOrder()
    for queue in [name for name in session.scalars(project_queues.select_queues()) if name is not None]:
        first = sorted(_find_first(session, queue))
        found.truncated.update([queue] if len(first) > MOST else [])
        entries = {
            one.job_id: OrderEntry(n, not limit or one.slot <= limit) for n, one in enumerate(first[:MOST], start=1)
        }
        found.entries.update(entries)
    return found


class _DueJob(NamedTuple):
    """A job that waits; these sort as they start."""

    due: float
    job_id: str
    slot: int


def _find_first(session: Session, queue: str) -> list[_DueJob]:
    """The first jobs of a queue in no order, one more than `MOST` if there are, and some that come later.

    A project queue is read further while its last known job is among the first of all known jobs, each time twice as
    far. So about twice as many rows are read as needed, in a dozen statements at most.
    """
    step = get_settings().priority_seconds
    known = _find_heads(session, queue, step)
    ends, reach = known, 1
    while starts := {end.job_id: end for end in ends if end.due <= _last_due_time(known)}:
        behind = _find_following(session, queue, starts, reach, step)
        known = [*known, *chain.from_iterable(behind.values())]
        ends = [jobs[-1] for jobs in behind.values() if len(jobs) == reach]
        reach *= 2
    return known


def _last_due_time(known: Sequence[_DueJob]) -> float:
    """The latest time at which a job is still among the first. It only gets earlier as more jobs become known."""
    return nsmallest(MOST + 1, known)[-1].due if len(known) > MOST else inf


def _find_heads(session: Session, queue: str, step: float) -> list[_DueJob]:
    rows = session.execute(_select_heads(), project_queues.queue_parameters([queue]))
    return [
        _DueJob(scheduling.compute_due_time(priority_time, slot, step), job_id, slot)
        for job_id, priority_time, slot in rows
    ]


@cache
def _select_heads() -> Select[str, float | None, int]:
    heads = project_queues.select_heads(aliased(Job))
    return select(Job.id, Job.priority_time, project_queues.count_running(Job.project_id) + 1).join(
        heads, heads.c.id == Job.id
    )


def _find_following(
    session: Session, queue: str, starts: Mapping[str, _DueJob], reach: int, step: float
) -> dict[str, list[_DueJob]]:
    """The next jobs, at most `reach`, behind these in their project queues; in order, by the job they come after."""
    given = {"starts": list(starts), "reach": reach, **project_queues.queue_parameters([queue])}
    found: dict[str, list[_DueJob]] = {}
    for start, further, job_id, priority_time in session.execute(_select_following(), given):
        slot = starts[start].slot + further
        found.setdefault(start, []).append(
            _DueJob(scheduling.compute_due_time(priority_time, slot, step), job_id, slot)
        )
    return found


@cache
def _select_following() -> Select[str, int, str, float | None]:
    start = select(Job.id, Job.project_id).where(Job.id.in_(bindparam("starts", expanding=True, type_=String)))
    walk = project_queues.select_following(aliased(Job), start, steps=lambda _: bindparam("reach", type_=Integer))
    rows = select(walk.c.start, walk.c.step, walk.c.id, project_queues.column_of(Job.priority_time, walk))
    return rows.where(walk.c.step > 0, walk.c.id.is_not(None)).order_by(walk.c.step)


class OrderCache:
    """The last order and the served queues. If they are too old, one thread reads them and the others wait for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._order = QueueOrder()
        self._made = float("-inf")
        self._served: set[str] = set()
        self._served_at = float("-inf")

    def order(self, wanted: Sequence[ShownJob], read: Callable[[], QueueOrder]) -> QueueOrder:
        """The order, read again by `read` when it is too old or a wanted job has joined the queue since."""
        with self._lock:
            asked = time.monotonic()
            if asked - self._made > MAX_AGE_SECONDS or not all(map(self._order.covers, wanted)):
                self._order, self._made = read(), asked
            return self._order

    def served(self, ask: Callable[[], set[str]]) -> set[str]:
        """The queues that some living worker takes jobs from, read again by `ask` if that was too long ago."""
        with self._lock:
            asked = time.monotonic()
            if asked - self._served_at > MAX_AGE_SECONDS:
                self._served, self._served_at = ask(), asked
            return self._served


_caches: WeakKeyDictionary[Engine | Connection, OrderCache] = WeakKeyDictionary()  # one for each database


def _get_cache(session: Session) -> OrderCache:
    return _caches.setdefault(session.get_bind(), OrderCache())
