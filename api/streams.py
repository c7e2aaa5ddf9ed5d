"""A job's events as they happen, as server-sent events: oldest first, until the job has ended or the server stops.

The bytes are chosen for the decoder in OpenAI's clients, which takes every blank line after an `id:` for an
event: a heartbeat is one line without a blank one behind it, and `retry:` stands in the block of an event.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.concurrency import run_in_threadpool

from api.core import events
from api.core.db import session_scope
from api.core.models import FINAL_STATUSES, Job
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

    def check_room(self, project_id: str) -> None:
        """Refuse one more stream of a project that has as many as it may.

        Raises:
            TooManyRequests: it is to be tried again.
        """
        if list(self._stops.values()).count(project_id) >= PER_PROJECT:
            message = f"{PER_PROJECT} streams of this project are open, and more are not served at once."
            raise TooManyRequests(message, code="rate_limit_exceeded", wait=5.0)

    def close(self) -> None:
        """End all of them, in the event loop's own thread: the server is about to stop."""
        self._closing = True
        for stop in self._stops:
            stop.set()

    async def follow(self, project_id: str, job_id: str, *, after: int) -> AsyncIterator[str]:
        """Whole blocks of text: the events after number `after`, then `[DONE]`, but not when the server stops."""
        stop = asyncio.Event()
        self._stops[stop] = project_id
        if self._closing:
            stop.set()
        try:
            async for block in _blocks(job_id, after, stop):
                yield block
        finally:
            del self._stops[stop]


async def _blocks(job_id: str, sent: int, stop: asyncio.Event) -> AsyncIterator[str]:
    retry, quiet = f"retry: {RETRY_MILLISECONDS}\n", 0.0
    while not stop.is_set():
        news = await run_in_threadpool(_news, job_id, sent)
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


def _news(job_id: str, sent: int) -> News:
    """What happened since; nothing while the database is away, which a client need not notice."""
    try:
        with session_scope(read_only=True) as session:
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
