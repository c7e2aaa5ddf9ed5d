"""Places in the queue, worked out for everybody at once and at most once a second, for the first hundred of a queue.

Ranking takes some ten times as long as all else that a poll does, and fifty callers who poll ask for the same
ranking. So what they are shown may be a second old; the claim looks anew (`api.core.queue.scheduling`).
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

MOST = 100  # further behind, a job's position is "after these"
MAX_AGE_SECONDS = 1.0
_AT_ANY_TIME = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Place:
    """Where a queued job stands, `MOST` + 1 for all that stand further behind, and why it is not running."""

    position: int
    reason: str


class Rank(NamedTuple):
    """A job's position among all that wait for the same workers, and whether its project's limit lets it start."""

    position: int
    allowed: bool


@dataclass(frozen=True)
class Ranking:
    """The first jobs of every queue by id, and the queues in which more wait than these."""

    ranks: dict[str, Rank] = field(default_factory=dict)
    long: set[str] = field(default_factory=set)

    def knows(self, job: ShownJob) -> bool:
        """Whether a job that waits would be here if it were among the first."""
        return job.id in self.ranks or job.queue in self.long


def of(session: Session, queued: Sequence[ShownJob]) -> dict[str, Place]:
    """The places of these jobs by id; one that has left the queue meanwhile has none."""
    if not queued:
        return {}
    board = _board(session)
    ranking = board.ranking(queued, lambda: rank(session))
    ranks = {job.id: ranking.ranks[job.id] for job in queued if job.id in ranking.ranks}
    behind = [job.id for job in queued if job.id not in ranks and job.queue in ranking.long]
    held = scheduling.held(session, behind) if behind else set()
    ranks |= {job_id: Rank(MOST + 1, job_id not in held) for job_id in behind}
    served = board.served(lambda: workers.served(session))
    at = now(session) if any(job.not_before is not None for job in queued) else _AT_ANY_TIME
    return {job.id: _place(job, ranks[job.id], at=at, served=served) for job in queued if job.id in ranks}


def _place(job: ShownJob, rank: Rank, *, at: datetime, served: set[str]) -> Place:
    waits = job.not_before is not None and job.not_before > at
    if job.queue not in served:
        reason = "no_worker_for_device"
    elif job.attempts or job.losses or waits:
        reason = "restarting"
    elif not rank.allowed:
        reason = "project_limit_reached"
    else:
        reason = "waiting_for_gpu" if rank.position == 1 else "waiting_for_turn"
    return Place(rank.position, reason)


def rank(session: Session) -> Ranking:
    """The ranking as it is now."""
    limit, found = get_settings().project_running, Ranking()
    for queue in [name for name in session.scalars(project_queues.queues()) if name is not None]:
        first = sorted(_first(session, queue))
        found.long.update([queue] if len(first) > MOST else [])
        ranks = {one.job_id: Rank(n, not limit or one.slot <= limit) for n, one in enumerate(first[:MOST], start=1)}
        found.ranks.update(ranks)
    return found


class _Due(NamedTuple):
    """A job that waits; these sort as they start."""

    due: float
    job_id: str
    slot: int


def _first(session: Session, queue: str) -> list[_Due]:
    """The first jobs of a queue in no order, one more than `MOST` if there are, and some that come later.

    A line is read on while its last known job is among the first of all that are known, each time twice as far. So
    about twice as many rows are read as are wanted, by a dozen statements at most.
    """
    step = get_settings().priority_seconds
    known = _heads(session, queue, step)
    ends, reach = known, 1
    while starts := {end.job_id: end for end in ends if end.due <= _bar(known)}:
        behind = _behind(session, queue, starts, reach, step)
        known = [*known, *chain.from_iterable(behind.values())]
        ends = [line[-1] for line in behind.values() if len(line) == reach]
        reach *= 2
    return known


def _bar(known: Sequence[_Due]) -> float:
    """When the last of the first is due, as far as is known: it only gets earlier."""
    return nsmallest(MOST + 1, known)[-1].due if len(known) > MOST else inf


def _heads(session: Session, queue: str, step: float) -> list[_Due]:
    rows = session.execute(_head_rows(), project_queues.named([queue]))
    return [_Due(scheduling.due(turn, slot, step), job_id, slot) for job_id, turn, slot in rows]


@cache
def _head_rows() -> Select[str, float | None, int]:
    heads = project_queues.heads(aliased(Job))
    return select(Job.id, Job.turn, project_queues.running(Job.project_id) + 1).join(heads, heads.c.id == Job.id)


def _behind(session: Session, queue: str, starts: Mapping[str, _Due], reach: int, step: float) -> dict[str, list[_Due]]:
    """The next jobs, at most `reach`, of the lines in which these stand; in their order, by the job they come after."""
    given = {"starts": list(starts), "reach": reach, **project_queues.named([queue])}
    found: dict[str, list[_Due]] = {}
    for start, further, job_id, turn in session.execute(_rows_behind(), given):
        slot = starts[start].slot + further
        found.setdefault(start, []).append(_Due(scheduling.due(turn, slot, step), job_id, slot))
    return found


@cache
def _rows_behind() -> Select[str, int, str, float | None]:
    start = select(Job.id, Job.project_id).where(Job.id.in_(bindparam("starts", expanding=True, type_=String)))
    walk = project_queues.walk(aliased(Job), start, steps=lambda _: bindparam("reach", type_=Integer))
    rows = select(walk.c.start, walk.c.step, walk.c.id, project_queues.value(Job.turn, walk))
    return rows.where(walk.c.step > 0, walk.c.id.is_not(None)).order_by(walk.c.step)


class Board:
    """The last ranking and the queues served. Threads that find them too old wait for the one that asks anew."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ranking = Ranking()
        self._made = float("-inf")
        self._served: set[str] = set()
        self._served_at = float("-inf")

    def ranking(self, wanted: Sequence[ShownJob], rank: Callable[[], Ranking]) -> Ranking:
        """The ranking, made anew by `rank` when it is too old or a wanted job has joined the queue since."""
        with self._lock:
            asked = time.monotonic()
            if asked - self._made > MAX_AGE_SECONDS or not all(map(self._ranking.knows, wanted)):
                self._ranking, self._made = rank(), asked
            return self._ranking

    def served(self, ask: Callable[[], set[str]]) -> set[str]:
        """The queues that some living worker takes jobs from, asked for anew when that is too long ago."""
        with self._lock:
            asked = time.monotonic()
            if asked - self._served_at > MAX_AGE_SECONDS:
                self._served, self._served_at = ask(), asked
            return self._served


_boards: WeakKeyDictionary[Engine | Connection, Board] = WeakKeyDictionary()  # one for each database


def _board(session: Session) -> Board:
    return _boards.setdefault(session.get_bind(), Board())
