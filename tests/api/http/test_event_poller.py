"""One look for all streams: what it costs does not grow with them, and none of them is held up by another."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy.orm import Session

from api.core.db.database import session_scope
from api.core.db.tables import Job
from api.http import event_poller, streams
from api.http.event_poller import EventPoller, NewEvents, StreamPosition
from api.http.streams import Streams
from api.schemas.event import make_event_object
from tests.api.http.test_stream import a_key, follow, say, sequences, until
from tests.statements import statements
from tests.things import a_project, a_running_job


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_poller, "BEAT_SECONDS", 0.01)


@pytest.fixture
def session(service: None) -> Iterator[Session]:
    """A session that really commits, because streams look at the database in threads of their own meanwhile.

    In the one transaction that other tests share, the end of a look would take back what was written during it.
    """
    with session_scope() as session:
        yield session


@pytest.fixture
def running(session: Session) -> Job:
    job, _ = a_running_job(session, a_project(session))
    session.commit()
    return job


def test_a_look_for_fifty_streams_takes_no_more_statements_than_for_one(running: Job) -> None:
    positions = [StreamPosition(running.id, 0, a_key(running.project_id)) for _ in range(50)]
    counts = []
    for some in (positions[:1], positions):
        with statements() as seen:
            found = event_poller.poll(some)
        assert len(found) == len(some)
        counts.append(len(seen))
    assert counts[0] == counts[1]


def test_a_look_where_nothing_is_new_reads_no_events(running: Job) -> None:
    count, key = running.event_count, a_key(running.project_id)
    with statements() as seen:
        assert event_poller.poll([StreamPosition(running.id, count, key)]) == {}
    assert not [one for one in seen if "FROM events" in one]


def test_streams_at_different_places_of_different_jobs_all_get_their_own(session: Session, running: Job) -> None:
    other, _ = a_running_job(session, a_project(session))
    say(session, running, "of the first")
    say(session, other, "of the second")

    async def watch() -> None:
        among = Streams()
        late = follow(running, among=among, after=running.event_count)
        readers = [follow(running, among=among), follow(other, among=among), late]
        firsts = [await until(one, text) for one, text in zip(readers, ("first", "second", "first"), strict=True)]
        assert sequences("".join(firsts[0])) == [1, 2, 3, 4]
        assert "of the first" not in "".join(firsts[1])
        assert sequences("".join(firsts[2])) == [4]

    asyncio.run(watch())


def test_more_streams_than_are_served_together_are_all_served(
    session: Session, running: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_poller, "TOGETHER", 2)
    key = a_key(running.project_id)

    async def watch() -> None:
        among = Streams()
        readers = [follow(running, among=among, key=key) for _ in range(5)]
        await asyncio.gather(*(until(one, "started") for one in readers))
        say(session, running, "at last")
        await asyncio.gather(*(until(one, "at last") for one in readers))

    asyncio.run(watch())


def test_a_stream_that_nobody_reads_holds_up_no_other(session: Session, running: Job) -> None:
    async def watch() -> None:
        among = Streams()
        unread, other = follow(running, among=among), follow(running, among=among)
        await until(unread, "started")
        await until(other, "started")
        for number in range(3):
            say(session, running, f"number {number}")
            await until(other, f"number {number}")
        assert sequences((await until(unread, "number 2"))[-1]) == [4, 5, 6]

    asyncio.run(watch())


def test_a_story_that_cannot_be_told_ends_its_own_streams_and_no_other(
    session: Session, running: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, _ = a_running_job(session, a_project(session))
    say(session, other, "cannot be told")

    def sometimes(event: Any) -> Any:
        if event.message == "cannot be told":
            raise ValueError("no event")
        return make_event_object(event)

    monkeypatch.setattr(event_poller, "make_event_object", sometimes)

    async def watch() -> None:
        among = Streams()
        broken, whole = follow(other, among=among), follow(running, among=among)
        with pytest.raises(ValueError, match="no event"):
            await until(broken, "started")
        await until(whole, "started")

    asyncio.run(watch())


def test_a_bug_in_a_look_ends_the_streams_instead_of_leaving_them_silent(
    running: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise LookupError("a bug")

    monkeypatch.setattr(event_poller, "poll", broken)
    with pytest.raises(LookupError, match="a bug"):
        asyncio.run(until(follow(running), "started"))


def test_nobody_looks_while_no_stream_waits(running: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    monkeypatch.setattr(event_poller, "poll", lambda positions: looks.append(1) or {})

    async def watch() -> int:
        one = EventPoller()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await one.wait_for_events(StreamPosition(running.id, 0, "key"), at_once=True)
        await asyncio.sleep(0.05)
        before = len(looks)
        await asyncio.sleep(0.1)
        return len(looks) - before

    assert asyncio.run(watch()) == 0
    assert len(looks) > 1


def test_a_stream_that_is_to_stop_never_says_done_before_the_last_events() -> None:
    """A client that has heard `[DONE]` does not come back for them."""
    stop = asyncio.Event()

    class Stopping(EventPoller):
        async def wait_for_events(self, position: StreamPosition, *, at_once: bool) -> NewEvents:
            stop.set()
            return NewEvents("the end", position.after + 1, 1, ended=True)

    async def watch() -> list[str]:
        return [text async for text in streams.follow(StreamPosition("job", 0, "key"), poller=Stopping(), stop=stop)]

    assert asyncio.run(watch()) == []
