"""Places in the queue are ranked for everybody at once, and not at every look."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session

from api.core.db import database
from api.core.db.tables import Job
from api.core.jobs import jobs, lookup
from api.core.queue import positions
from api.core.queue.positions import OrderCache, OrderEntry, QueueOrder
from tests.things import a_project, a_queued_job


@pytest.fixture
def rankings(session: Session, environment: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The statements that ranked the queue; what was ranked counts for a minute."""
    environment.setattr(positions, "MAX_AGE_SECONDS", 60.0)
    seen: list[str] = []

    def look(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        seen.extend([statement] if "heads" in statement else [])

    event.listen(session.get_bind(), "before_cursor_execute", look)
    yield seen
    event.remove(session.get_bind(), "before_cursor_execute", look)


def shown_positions(session: Session, *queued: Job) -> list[int | None]:
    return [view.position.position if view.position else None for view in lookup.load_views(session, queued)]


def test_one_ranking_serves_everybody(session: Session, rankings: list[str]) -> None:
    first, second = (a_queued_job(session, a_project(session)) for _ in range(2))
    assert shown_positions(session, second) == [2]
    assert shown_positions(session, first, second) == [1, 2]
    with database.session_scope(read_only=True) as other:
        assert shown_positions(other, second) == [2]
    assert len(rankings) == 1


def test_a_job_that_is_new_in_the_queue_has_its_place_at_once(session: Session, rankings: list[str]) -> None:
    first = a_queued_job(session, a_project(session))
    assert shown_positions(session, first) == [1]
    second = a_queued_job(session, a_project(session))
    assert shown_positions(session, second, first) == [2, 1]
    assert len(rankings) == 2


def test_a_ranking_too_old_is_made_anew(session: Session, rankings: list[str], environment: pytest.MonkeyPatch) -> None:
    first, second = (a_queued_job(session, a_project(session)) for _ in range(2))
    assert shown_positions(session, second) == [2]
    jobs.cancel(session, first)
    assert shown_positions(session, second) == [2]
    environment.setattr(positions, "MAX_AGE_SECONDS", 0.0)
    assert shown_positions(session, second) == [1]


def test_a_job_that_left_the_queue_has_no_place(session: Session, rankings: list[str]) -> None:
    job = a_queued_job(session, a_project(session))
    stale = [job]
    jobs.claim(session, "worker:1", lease_seconds=30)
    session.expunge(job)
    job.status = "queued"  # as it was read a moment before
    assert positions.find_positions(session, stale) == {}


def test_threads_that_ask_at_once_rank_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(positions, "MAX_AGE_SECONDS", 60.0)
    cache, ranked, together = OrderCache(), list[float](), threading.Barrier(8)

    def rank() -> QueueOrder:
        ranked.append(time.monotonic())
        time.sleep(0.05)
        return QueueOrder({"job": OrderEntry(1, allowed=True)})

    def ask(_: int) -> int:
        together.wait()
        return cache.order([Job(id="job", queue="train")], rank).entries["job"].position

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [1] * 8
    assert len(ranked) == 1


def test_behind_the_first_of_a_long_queue_everybody_has_one_place(
    session: Session, rankings: list[str], environment: pytest.MonkeyPatch
) -> None:
    environment.setattr(positions, "MOST", 2)
    project = a_project(session)
    jobs = [a_queued_job(session, project) for _ in range(5)]
    assert shown_positions(session, *jobs) == [1, 2, 3, 3, 3]
    assert shown_positions(session, a_queued_job(session, project)) == [3]
    assert len(rankings) == 1, "a job that is not among the first is no reason to rank anew"
