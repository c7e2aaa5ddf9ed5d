"""Connections: uvicorn's protocol with what it has no setting for, and the options of sockets that do the rest.

uvicorn waits for ever for a request's head, keeps all of it, answers in plain text what it cannot read, and takes
as many connections as come. What waits for a client that reads nothing is bounded by the kernel, which also drops it.
"""

import asyncio
import json
import resource
import socket
from collections import Counter
from collections.abc import Sequence

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from api.core import logs
from api.core.errors import Refusal
from api.core.settings import Settings, get_settings
from api.errors import BadRequest, HeadTooLarge, TooSlow, error_body, status_of
from api.http.concurrency import network
from api.middleware import PACE

UNSENT_BYTES = 128 * 1024  # that the kernel holds of a connection, beside what the client has room for
PIPELINED = 16  # requests that wait for the answer to the one before
LINGER_SECONDS = 2.0  # for a client to read why it was refused, before its connection is closed
SAY_SECONDS = 10.0  # between two lines of the log about connections that made room
OTHER_FILES = 200  # that a process has open beside connections: the database, storage, logs


def limit_unsent(connection: socket.socket, settings: Settings) -> None:
    """Let the kernel hold little for a client that does not read, and drop it after `stall_seconds`."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
    # For bytes that are not acknowledged, and (Linux 5.11) for a client that has no room for more.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, settings.stall_seconds * 1000)


def allow_open_files(settings: Settings) -> None:
    """Let this process have as many files open as its connections need.

    Raises:
        SystemExit: the system allows fewer; it says what to do.
    """
    needed = settings.connections + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        advice = f"raise it (ulimit -n), or set LORAINIT_CONNECTIONS to {max(1, hard - OTHER_FILES)} or less"
        raise SystemExit(f"error: this process may have {hard} files open, and {needed} are needed: {advice}.")
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class Connection(HttpToolsProtocol):
    """A connection that must say what it wants, in time and in few bytes, or make room for one that does."""

    _deadline: asyncio.TimerHandle | None = None
    _head = 0  # bytes received that are neither of a body nor of a finished head
    _rest = 0  # bytes of a body whose request is answered already
    _refused = False
    said = -SAY_SECONDS  # when the log was told that there are too many; of the class
    since = 0.0  # when it was last answered, or made

    # --- what uvicorn calls ---------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """It may be one too many: then the one that is needed least is closed."""
        super().connection_made(transport)
        self._settings = get_settings()
        limit_unsent(transport.get_extra_info("socket"), self._settings)
        self.since = self.loop.time()
        self._expect_head()
        if len(self.connections) > self._settings.connections:
            _make_room([one for one in self.connections if isinstance(one, Connection)], now=self.since)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse it; the head of a request has a largest size, and a time to be complete."""
        if self._refused:
            return
        self._head += len(data)
        super().data_received(data)
        if self._head > self._settings.max_head_bytes:
            limit = self._settings.max_head_bytes
            self._refuse(HeadTooLarge(f"The request's head is larger than {limit} bytes.", code="head_too_large"))
        elif self.is_idle and self._deadline is None:
            self._expect_head()

    def on_headers_complete(self) -> None:
        """A request is under way."""
        self._head = 0
        self._stop_waiting()
        if len(self.pipeline) >= PIPELINED:
            self.transport.abort()
            raise ConnectionAbortedError  # the parser goes no further
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of the body came."""
        self._head = 0
        if self.is_idle:
            self._rest += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The body is complete; the head of the next request follows."""
        self._head = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """An answer is given; uvicorn waits for the next request if there is none yet."""
        self.since, self._rest = self.loop.time(), 0
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002  (uvicorn's words)
        """What was sent is not HTTP."""
        self._refuse(BadRequest("The request could not be read: it is not valid HTTP/1.1.", code="malformed_request"))

    # --- what is added --------------------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Nothing is being answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def worth(self) -> tuple[bool, bool]:
        """What is lost if it is closed: a request that is being answered, bytes that are still to leave."""
        return not self.is_idle, self.transport.get_write_buffer_size() > 0

    def drop(self) -> None:
        """Close it at once."""
        self.connections.discard(self)
        self.transport.abort()

    def _expect_head(self) -> None:
        self._deadline = self.loop.call_later(self._settings.head_seconds, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        if self._rest >= PACE * self._settings.head_seconds:  # a refused upload, which its client goes on sending
            self._rest = 0
            self._expect_head()
        elif self._head:
            seconds = self._settings.head_seconds
            text = f"The request's head came too slowly: {self._head} bytes in {seconds:.0f} s."
            self._refuse(TooSlow(text, code="head_too_slow"))
        else:
            self.transport.close()

    def _refuse(self, refusal: Refusal) -> None:
        """Say why, and close the connection; without a word where the answer to another request is on its way."""
        if self._refused or self.transport.is_closing():
            return
        logs.get_logger(__name__).info("connection_refused", code=refusal.code)
        if not self.is_idle:
            if self.cycle.response_started or self.pipeline:
                self.drop()
                return
            self.cycle.disconnected = True  # what it would say is not sent any more
            self.cycle.message_event.set()
        self._refused = True
        self.transport.write(_as_http(refusal))
        self.transport.write_eof()
        # Closed at once, a client that is still sending would be told of a broken connection and not see the reason.
        self._stop_waiting()
        self._deadline = self.loop.call_later(LINGER_SECONDS, self.transport.abort)


def _make_room(connections: Sequence[Connection], *, now: float) -> None:
    """Close one: not one that is being answered if there is another; of the address that has most; its oldest."""
    least = min(one.worth for one in connections)
    needless = [one for one in connections if one.worth == least]
    crowd = Counter(network(one.client) for one in needless)
    if now > Connection.said + SAY_SECONDS:
        Connection.said = now
        logs.get_logger(__name__).warning("connections_full", connections=len(connections))
    max(needless, key=lambda one: (crowd[network(one.client)], -one.since)).drop()


def _as_http(refusal: Refusal) -> bytes:
    status = status_of(refusal)
    body = json.dumps(error_body(refusal.message, code=refusal.code, status=status)).encode()
    headers = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    return b"".join((STATUS_LINE[status], headers.encode(), body))
