"""A job's events as they happen, as server-sent events: oldest first, until the job has ended or the server stops.

The format suits the decoder in OpenAI's clients, which takes every blank line after an `id:` for an event. So a
heartbeat is one line without a blank line behind it, and `retry:` is in the block of an event.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from api.core.access.keys import Caller
from api.errors import TooManyRequests
from api.http.event_poller import EventPoller, StreamPosition

HEARTBEAT_SECONDS = 15.0  # because proxies close connections that are silent for 30 or 60 seconds
RETRY_MILLISECONDS = 3000  # before a client reconnects, so that clients do not crowd a server that restarts
PER_PROJECT = 50  # so that one project cannot use all connections of a process
HEARTBEAT = ": keep-alive\n"
DONE = "event: done\ndata: [DONE]\n\n"


class Streams:
    """The streams that this process has open."""

    def __init__(self) -> None:
        self.poller = EventPoller()
        self._stops: dict[asyncio.Event, str] = {}
        self._closing = False

    def close(self) -> None:
        """End all of them, because the server is about to stop. Call it in the event loop's thread."""
        self._closing = True
        for stop in self._stops:
            stop.set()
        self.poller.end()

    @contextmanager
    def register(self, project_id: str) -> Iterator[asyncio.Event]:
        """Count one stream of a project while the context is open. The event is set when the stream has to end.

        Call it in the event loop's thread, so that two streams cannot pass the check together.

        Raises:
            TooManyRequests: the project has as many as it may.
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
    """The answer that follows a job. It is counted when it begins, and is an error if the project has too many."""

    def __init__(self, streams: Streams, caller: Caller, job_id: str, *, after: int) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__((), media_type="text/event-stream", headers=headers)
        self._streams, self._project_id = streams, caller.project_id
        self._position = StreamPosition(job_id, after, caller.key_id)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, and count the stream no longer when that ends."""
        with self._streams.register(self._project_id) as stop:
            self.body_iterator = follow(self._position, poller=self._streams.poller, stop=stop)
            await super().__call__(scope, receive, send)


async def follow(position: StreamPosition, *, poller: EventPoller, stop: asyncio.Event) -> AsyncIterator[str]:
    """Whole blocks of text: the events from this position on, then `[DONE]`.

    It ends without `[DONE]` when the server stops, and within a second after the key is deleted or has expired.
    """
    retry, at_once = f"retry: {RETRY_MILLISECONDS}\n", True
    while not stop.is_set():
        # It waits on through heartbeats, so that a query that takes longer than one is not thrown away.
        waiting = asyncio.ensure_future(poller.wait_for_events(position, at_once=at_once))
        try:
            while not (await asyncio.wait({waiting}, timeout=HEARTBEAT_SECONDS))[0]:
                yield HEARTBEAT
            news = await waiting
        finally:
            waiting.cancel()
        if news is None or stop.is_set():
            return
        if news.count:
            yield retry + news.text
            retry, position = "", replace(position, after=news.last)
        if news.ended:
            yield DONE
            return
        at_once = news.is_full
