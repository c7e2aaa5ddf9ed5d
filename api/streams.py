"""A job's events as they happen, as server-sent events: oldest first, until the job has ended or the server stops.

The bytes are chosen for the decoder in OpenAI's clients, which takes every blank line after an `id:` for an
event: a heartbeat is one line without a blank one behind it, and `retry:` stands in the block of an event.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from api.core import events, keys
from api.core.db import session_scope
from api.core.keys import Caller
from api.core.models import FINAL_STATUSES, ApiKey, Job
from api.errors import TooManyRequests
from api.schemas.event import EventObject, event_object

POLL_SECONDS = 1.0
HEARTBEAT_SECONDS = 15.0
RETRY_MILLISECONDS = 3000
PAGE = 200
PER_PROJECT = 50
HEARTBEAT = ": keep-alive\n"
DONE = "event: done\ndata: [DONE]\n\n"
DATABASE_AWAY = (OperationalError, InterfaceError, PoolTimeout)


@dataclass(frozen=True)
class News:
    """What a stream has not sent yet, and whether the job has ended and nothing will follow."""

    text: str
    last: int
    count: int
    ended: bool


class Streams:
    """The streams that this process has open."""

    def __init__(self) -> None:
        self._stops: dict[asyncio.Event, str] = {}
        self._closing = False

    def close(self) -> None:
        """End all of them, in the event loop's own thread: the server is about to stop."""
        self._closing = True
        for stop in self._stops:
            stop.set()

    @contextmanager
    def place(self, project_id: str) -> Iterator[asyncio.Event]:
        """A place among the streams of a project while the context is open; the event says that the stream is to end.

        To be taken in the event loop's own thread: so no two streams find the same place free.

        Raises:
            TooManyRequests: the project has as many as it may. It is to be tried again.
        """
        if list(self._stops.values()).count(project_id) >= PER_PROJECT:
            message = f"{PER_PROJECT} streams of this project are open, and more are not served at once."
            raise TooManyRequests(message, code="rate_limit_exceeded", wait=5.0)
        stop = asyncio.Event()
        if self._closing:
            stop.set()
        self._stops[stop] = project_id
        try:
            yield stop
        finally:
            del self._stops[stop]


class EventStream(StreamingResponse):
    """The answer that follows a job. It takes its place when it begins, and is a refusal where there is none."""

    def __init__(self, streams: Streams, caller: Caller, job_id: str, *, after: int) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__((), media_type="text/event-stream", headers=headers)
        self._streams, self._caller, self._job_id, self._after = streams, caller, job_id, after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, and give the place back however that ends."""
        with self._streams.place(self._caller.project_id) as stop:
            self.body_iterator = follow(self._job_id, after=self._after, key_id=self._caller.key_id, stop=stop)
            await super().__call__(scope, receive, send)


async def follow(job_id: str, *, after: int, key_id: str, stop: asyncio.Event) -> AsyncIterator[str]:
    """Whole blocks of text: the events after number `after`, then `[DONE]`.

    Without `[DONE]` it ends when it is to stop, and within a second once the key is deleted or has expired.
    """
    retry, quiet, sent = f"retry: {RETRY_MILLISECONDS}\n", 0.0, after
    while not stop.is_set():
        news = await run_in_threadpool(_news, job_id, sent, key_id)
        if news is None:
            return
        if news.count and not stop.is_set():
            yield retry + news.text
            retry, quiet, sent = "", 0.0, news.last
        if news.ended:
            yield DONE
            return
        if news.count < PAGE:
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await stop.wait()
            quiet += POLL_SECONDS
        if quiet >= HEARTBEAT_SECONDS:
            yield HEARTBEAT
            quiet = 0.0


def _news(job_id: str, sent: int, key_id: str) -> News | None:
    """What happened since; nothing while the database is away, which a client need not notice; None for a dead key."""
    try:
        with session_scope(read_only=True) as session:
            if not keys.is_usable(session, session.get(ApiKey, key_id)):
                return None
            # Before the events: what ended the job is among them.
            status = session.scalar(select(Job.status).where(Job.id == job_id))
            rows = events.since(session, job_id, sent, limit=PAGE)
    except DATABASE_AWAY:
        return News("", sent, 0, ended=False)
    ended = len(rows) < PAGE and (status is None or status in FINAL_STATUSES)
    text = "".join(_block(event_object(row)) for row in rows)
    return News(text, rows[-1].sequence if rows else sent, len(rows), ended)


def _block(event: EventObject) -> str:
    # ASCII: some clients take characters like U+2028 for the end of a line.
    data = json.dumps(event.model_dump(mode="json"), separators=(",", ":"), allow_nan=False)
    return f"id: {event.id}\nevent: {event.type}\ndata: {data}\n\n"
