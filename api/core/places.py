"""Everybody's place in the queue, worked out for all queued jobs at once and at most once a second.

Ranking a thousand jobs takes some ten times as long as all else that a poll does, and fifty callers who
poll ask for the same ranking. So what they are shown may be a second old; the claim ranks anew
(`api.core.turns`).
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine, func, select
from sqlalchemy.orm import Session

from api.core import turns, workers
from api.core.db import now
from api.core.models import ShownJob

MAX_AGE_SECONDS = 1.0
_AT_ANY_TIME = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Place:
    """Where a queued job stands, and why it is not running."""

    position: int
    reason: str


class Rank(NamedTuple):
    """A job's position among all that wait for the same workers, and whether its project's limit lets it start."""

    position: int
    allowed: bool


def of(session: Session, queued: Sequence[ShownJob]) -> dict[str, Place]:
    """The places of these jobs by id; one that has left the queue meanwhile has none."""
    if not queued:
        return {}
    board = _board(session)
    ranks = board.ranks([job.id for job in queued], lambda: _rank_all(session))
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


def _rank_all(session: Session) -> dict[str, Rank]:
    line = turns.line()
    position = func.row_number().over(partition_by=line.c.queue, order_by=(line.c.due, line.c.id))
    rows = session.execute(select(line.c.id, position, turns.within_limit(line)))
    return {job_id: Rank(place, bool(allowed)) for job_id, place, allowed in rows}


class Board:
    """The last ranking and the queues served. Threads that find them too old wait for the one that asks anew."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ranks: Mapping[str, Rank] = {}
        self._made = float("-inf")
        self._served: set[str] = set()
        self._served_at = float("-inf")

    def ranks(self, wanted: Sequence[str], rank_all: Callable[[], Mapping[str, Rank]]) -> Mapping[str, Rank]:
        """The ranking, made anew by `rank_all` when it is too old or a wanted job has joined the queue since."""
        with self._lock:
            asked = time.monotonic()
            if asked - self._made > MAX_AGE_SECONDS or any(job_id not in self._ranks for job_id in wanted):
                self._ranks, self._made = rank_all(), asked
            return self._ranks

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
