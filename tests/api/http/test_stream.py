"""The stream of a job's events: every event once, in order, whatever is cut; bytes that OpenAI's decoder can read."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from api.core.access import keys
from api.core.db.database import session_scope
from api.core.db.tables import Job, Project
from api.core.jobs import events, jobs
from api.errors import TooManyRequests
from api.http import event_poller, streams
from api.http.event_poller import StreamPosition
from api.http.streams import EventStream, Streams
from tests import stub_worker
from tests.api.conftest import JOBS, Lab, refused
from tests.things import a_project, a_running_job

pytestmark = pytest.mark.one_database


def blocks(text: str) -> list[dict[str, str]]:
    """Fields of each block. A heartbeat is no block and is followed by no blank line."""
    assert text.endswith("\n\n")
    found = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        lines = [line for line in block.split("\n") if not line.startswith(":")]
        assert any(line.startswith("data: ") for line in lines), text
        found.append({name: value for name, _, value in (line.partition(": ") for line in lines)})
    return found


def sequences(text: str) -> list[int]:
    return [json.loads(block["data"])["sequence"] for block in blocks(text) if block["data"] != "[DONE]"]


@pytest.fixture
def ended(lab: Lab) -> str:
    """A job that went well and is over."""
    job = lab.order()["id"]
    stub_worker.run_all()
    return job


def stream(lab: Lab, job: str, **query: Any) -> Any:
    reply = lab.client.get(f"{JOBS}/{job}/events/stream", **query)
    assert reply.status_code == 200
    return reply


def listed(lab: Lab, job: str) -> list[dict[str, Any]]:
    """The job's events, oldest first."""
    return lab.client.get(f"{JOBS}/{job}/events", params={"limit": 1000}).json()["data"][::-1]


# --- what is sent ---------------------------------------------------------------------------------


def test_a_job_that_is_over_is_told_oldest_first_and_the_stream_ends(lab: Lab, ended: str) -> None:
    reply = stream(lab, ended)
    *told, last = blocks(reply.text)
    assert [json.loads(block["data"]) for block in told] == listed(lab, ended)
    assert all(block["id"] == json.loads(block["data"])["id"] for block in told)
    assert {block["event"] for block in told} == {"message", "metrics"}
    assert last == {"event": "done", "data": "[DONE]"}
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert (reply.headers["cache-control"], reply.headers["x-accel-buffering"]) == ("no-store", "no")


def test_how_soon_to_come_back_is_said_once_and_in_the_first_events_block(lab: Lab, ended: str) -> None:
    first, *others = blocks(stream(lab, ended).text)
    assert first["retry"] == "3000"
    assert not any("retry" in block for block in others)


def test_a_long_story_is_told_whole(lab: Lab, ended: str, monkeypatch: pytest.MonkeyPatch) -> None:
    count = len(listed(lab, ended))
    for page in (1, 2, count - 1, count, count + 1):
        monkeypatch.setattr(event_poller, "PAGE", page)
        assert sequences(stream(lab, ended).text) == list(range(1, count + 1))


def test_after_an_event_only_what_followed_is_told(lab: Lab, ended: str) -> None:
    story = listed(lab, ended)
    third = {"last-event-id": story[2]["id"]}
    assert sequences(stream(lab, ended, headers=third).text)[0] == 4
    assert sequences(stream(lab, ended, params={"after": story[4]["id"]}).text)[0] == 6
    # A client that reconnects repeats the address it began with.
    assert sequences(stream(lab, ended, headers=third, params={"after": story[0]["id"]}).text)[0] == 4
    assert sequences(stream(lab, ended, headers={"last-event-id": story[-1]["id"]}).text) == []


def test_after_an_unknown_event_everything_is_told(lab: Lab, ended: str) -> None:
    other = lab.order(suffix="other")["id"]
    for strange in ("ftevent-0", listed(lab, other)[0]["id"], ""):
        assert sequences(stream(lab, ended, headers={"last-event-id": strange}).text)[0] == 1


def test_a_failure_is_told_as_an_event_and_not_as_an_error_of_the_stream(session: Session, lab: Lab) -> None:
    job, lease = a_running_job(session, lab.project)
    jobs.fail(session, lease, jobs.Failure("out_of_memory", "It did not fit."))
    session.commit()
    last = json.loads(blocks(stream(lab, job.id).text)[-2]["data"])
    assert "error" not in last
    assert last["data"]["error"]["code"] == "out_of_memory"


def test_what_some_clients_take_for_the_end_of_a_line_is_escaped(session: Session, lab: Lab) -> None:
    job, _ = a_running_job(session, lab.project)
    events.append(session, job.id, "one\u2028two\x85three\nfour", at=job.created_at)
    jobs.cancel(session, job)
    session.commit()
    text = stream(lab, job.id).text
    assert text.isascii()
    assert "one\u2028two\x85three\nfour" in [json.loads(b["data"]).get("message") for b in blocks(text)[:-1]]


def test_a_job_of_nobody_is_unknown(lab: Lab) -> None:
    refused(lab.client.get(f"{JOBS}/ftjob-x/events/stream"), 404, "fine_tune_not_found", "fine_tune_id")


# --- while a job runs -----------------------------------------------------------------------------


@pytest.fixture
def session(service: None) -> Iterator[Session]:
    """A session that really commits, because streams look at the database in threads of their own meanwhile.

    In the one transaction that other tests share, the end of a look would take back what was written during it.
    """
    with session_scope() as session:
        yield session


@pytest.fixture
def running(session: Session, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job at work, and streams that look often."""
    monkeypatch.setattr(event_poller, "BEAT_SECONDS", 0.01)
    job, _ = a_running_job(session, a_project(session))
    session.commit()
    return job


def say(session: Session, job: Job, text: str) -> None:
    events.append(session, job.id, text, at=job.created_at)
    session.commit()


def follow(
    job: Job,
    *,
    after: int = 0,
    among: Streams | None = None,
    stop: asyncio.Event | None = None,
    key: str | None = None,
) -> AsyncIterator[str]:
    """What somebody with a key of the job's project sees, among these streams or alone."""
    position = StreamPosition(job.id, after, key or a_key(job.project_id))
    return streams.follow(position, poller=(among or Streams()).poller, stop=stop or asyncio.Event())


def a_key(project_id: str, **more: Any) -> str:
    with session_scope() as session:
        key, _ = keys.create_key(session, session.get_one(Project, project_id), name="watcher", **more)
        session.commit()
        return key.id


async def until(stream: AsyncIterator[str], part: str) -> list[str]:
    """What comes, up to the first text that has `part` in it."""
    seen = []
    async with asyncio.timeout(10):
        async for text in stream:
            seen.append(text)
            if part in text:
                return seen
    raise AssertionError(f"{part!r} never came: {seen}")


def test_events_arrive_as_they_happen_until_the_job_ends(session: Session, running: Job) -> None:
    async def watch() -> None:
        following = follow(running)
        await until(following, "started")
        for text in ("first", "second"):
            say(session, running, text)
            assert len(await until(following, text)) == 1
        jobs.cancel(session, running)
        session.commit()
        assert (await until(following, "[DONE]"))[-1] == streams.DONE
        assert [text async for text in following] == []

    asyncio.run(watch())


def test_a_heartbeat_is_one_line_without_a_blank_one_behind_it(
    session: Session, running: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "HEARTBEAT_SECONDS", 0.03)

    async def watch() -> str:
        following = follow(running, after=running.event_count)
        quiet = await until(following, "keep-alive") + await until(following, "keep-alive")
        say(session, running, "at last")
        return "".join(quiet + await until(following, "at last"))

    text = asyncio.run(watch())
    assert text.startswith(": keep-alive\n: keep-alive\n")
    assert len(blocks(text)) == 1


def test_a_query_that_takes_longer_than_a_heartbeat_is_waited_for(
    session: Session, running: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "HEARTBEAT_SECONDS", 0.01)
    poll = event_poller.poll

    def slowly(positions: Any) -> Any:
        time.sleep(0.1)
        return poll(positions)

    monkeypatch.setattr(event_poller, "poll", slowly)
    seen = asyncio.run(until(follow(running), "started"))
    assert seen[0] == streams.HEARTBEAT


def test_a_database_that_is_away_for_a_moment_goes_unnoticed(
    session: Session, running: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    since, calls = events.list_since, []

    def sometimes(*arguments: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) % 2:
            raise OperationalError("SELECT", {}, Exception("gone"))
        return since(*arguments, **more)

    monkeypatch.setattr(events, "list_since", sometimes)
    jobs.cancel(session, running)
    session.commit()
    following = follow(running)
    assert asyncio.run(until(following, "[DONE]"))[-1] == streams.DONE
    assert len(calls) >= 2


def test_a_server_that_stops_ends_its_streams_without_saying_done(running: Job) -> None:
    async def watch() -> list[str]:
        opened = Streams()
        with opened.register("p") as stop:
            following = follow(running, among=opened, stop=stop)
            await until(following, "started")
            opened.close()
            rest = [text async for text in following]
        with opened.register("p") as late:
            return rest + [text async for text in follow(running, among=opened, stop=late)]

    assert asyncio.run(watch()) == []


def test_a_project_has_so_many_streams_and_a_closed_one_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "PER_PROJECT", 2)

    async def watch() -> None:
        opened = Streams()
        with opened.register("p"):
            with opened.register("p"):
                with pytest.raises(TooManyRequests) as caught, opened.register("p"):
                    raise AssertionError
                assert (caught.value.code, caught.value.wait) == ("rate_limit_exceeded", 5.0)
                with opened.register("another"):
                    pass
            with opened.register("p"):
                pass

    asyncio.run(watch())


def test_answers_that_begin_at_once_are_no_more_than_a_project_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every route has answered before the first stream begins, as it is when many come together."""
    monkeypatch.setattr(streams, "PER_PROJECT", 5)
    begun: list[int] = []

    async def endless(*_: Any, **__: Any) -> AsyncIterator[str]:
        yield "event"
        await asyncio.Event().wait()

    async def watch() -> list[BaseException | None]:
        opened, gone, caller = Streams(), asyncio.Event(), keys.Caller("key", "proj", "member")
        answers = [EventStream(opened, caller, "job", after=0) for _ in range(8)]

        async def receive() -> dict[str, str]:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                begun.append(message["status"])
                if len(begun) == 5:
                    gone.set()

        scope = {"type": "http", "asgi": {"spec_version": "2.0"}}
        return await asyncio.gather(*(one(scope, receive, send) for one in answers), return_exceptions=True)

    monkeypatch.setattr(streams, "follow", endless)
    ends = asyncio.run(watch())
    assert begun == [200] * 5
    assert [type(end) for end in ends if end is not None] == [TooManyRequests] * 3


# --- whose key it is ------------------------------------------------------------------------------


def test_a_deleted_key_ends_its_streams_at_the_next_look_without_saying_done(session: Session, running: Job) -> None:
    async def watch() -> list[str]:
        key, other = a_key(running.project_id), follow(running)
        following = follow(running, key=key)
        await until(following, "started")
        await until(other, "started")
        keys.delete_key(session, key)
        say(session, running, "secret")
        assert await until(other, "secret"), "another key of the project goes on"
        return [text async for text in following]

    assert asyncio.run(watch()) == []


def test_a_key_that_expires_ends_its_streams(session: Session, running: Job) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=0.5)

    async def watch() -> list[str]:
        async with asyncio.timeout(10):
            return [text async for text in follow(running, key=a_key(running.project_id, expires_at=soon))]

    assert "started" in "".join(asyncio.run(watch()))
