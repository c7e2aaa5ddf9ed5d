"""Streams of a real server process: cut, left open, and asked to end."""

import http.client
import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from itertools import islice
from pathlib import Path

import psutil
import pytest
from sqlalchemy import select

from api.core.db.database import now, session_scope
from api.core.db.tables import Event, Job, Project
from api.core.jobs import events, jobs
from tests import servers
from tests.api.conftest import JOBS
from tests.api.test_server import Server, eventually, server, web
from tests.promises import within
from tests.things import a_running_job

pytestmark = pytest.mark.one_database
__all__ = ["server", "web"]  # fixtures


@pytest.fixture
def running(server: Server) -> str:
    """A job at work, of the project that the server's key belongs to."""
    with session_scope() as session:
        job, _ = a_running_job(session, session.get_one(Project, server.project))
        session.commit()
        return job.id


@contextmanager
def opened(server: Server, job: str, last: str = "") -> Iterator[http.client.HTTPResponse]:
    connection = server.connect()
    headers = {"authorization": f"Bearer {server.secret}", "last-event-id": last}
    connection.request("GET", f"{JOBS}/{job}/events/stream", headers=headers)
    with closing(connection), connection.getresponse() as reply:
        yield reply


def ids(reply: http.client.HTTPResponse) -> Iterator[str]:
    """Event ids as they come, to the end of the stream."""
    for line in reply:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])["id"]


def say(job_id: str, text: str) -> None:
    with session_scope() as session:
        events.append(session, job_id, text, at=now(session))
        session.commit()


def test_a_stream_cut_twenty_times_in_mid_run_misses_and_doubles_nothing(server: Server, running: str) -> None:
    def work() -> None:
        for number in range(60):
            say(running, f"step {number}")
            time.sleep(0.02)
        with session_scope() as session:
            jobs.cancel(session, session.get_one(Job, running))
            session.commit()

    worker = threading.Thread(target=work)
    worker.start()
    seen: list[str] = []
    for _ in range(20):
        with opened(server, running, seen[-1] if seen else "") as reply:
            seen += islice(ids(reply), 2)
    with opened(server, running, seen[-1]) as reply:
        seen += ids(reply)
    worker.join()
    with session_scope(read_only=True) as session:
        story = session.scalars(select(Event.id).where(Event.job_id == running).order_by(Event.sequence)).all()
    assert seen == story


def test_a_server_that_stops_ends_an_open_stream_cleanly_and_at_once(
    server: Server, running: str, tmp_path: Path
) -> None:
    before = psutil.Process().children()
    with servers.web({}, log=tmp_path / "web.log") as url:
        (process,) = [one for one in psutil.Process().children() if one not in before]
        with opened(Server(url, server.project, server.secret, tmp_path), running) as reply:
            assert reply.readline() == b"retry: 3000\n"
            started = time.monotonic()
            process.send_signal(signal.SIGTERM)
            rest = reply.read()  # raises if the stream is broken off instead of ended
    assert time.monotonic() - started < within(2)
    assert b"[DONE]" not in rest


def test_a_client_that_goes_away_frees_its_place(server: Server, running: str) -> None:
    with ExitStack() as exits:
        for _ in range(50):
            assert exits.enter_context(opened(server, running)).readline() == b"retry: 3000\n"
        with opened(server, running) as refused:
            assert (refused.status, refused.getheader("retry-after")) == (429, "5")

    def is_served() -> bool:
        with opened(server, running) as reply:
            return reply.status == 200

    assert eventually(is_served)


def test_of_sixty_that_come_together_fifty_are_served(server: Server, running: str) -> None:
    with ExitStack() as exits, ThreadPoolExecutor(60) as pool:
        replies = list(pool.map(lambda _: exits.enter_context(opened(server, running)), range(60)))
        assert sorted(reply.status for reply in replies) == [200] * 50 + [429] * 10
