"""Limits on connections that uvicorn has no settings for.

uvicorn alone waits for ever for the head of a request, keeps a head of any size in memory, answers malformed requests
in plain text, and accepts any number of connections. For clients that do not read, socket options make the kernel
bound what waits for them and close the connection.
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
from api.errors import BadRequest, HeadTooLarge, TooSlow, make_error_body, status_of
from api.http.concurrency import find_network
from api.middleware import PACE

UNSENT_BYTES = 128 * 1024  # that the kernel keeps for a connection, beside what the client can receive
PIPELINED = 16  # requests of one connection that may wait for an earlier answer
LINGER_SECONDS = 2.0  # for a refused client to read the reason before its connection is closed
LOG_SECONDS = 10.0  # between two log lines about too many connections, because a crowd would fill the log
OTHER_FILES = 200  # that a process has open besides connections: the database, storage, logs


def limit_unsent(connection: socket.socket, settings: Settings) -> None:
    """Make the kernel keep few bytes for a client that does not read, and disconnect it after `stall_seconds`."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
    # Applies to bytes that are not acknowledged and, since Linux 5.11, to a client whose receive window stays full.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, settings.stall_seconds * 1000)


def allow_open_files(settings: Settings) -> None:
    """Let this process have as many files open as its connections need.

    Raises:
        SystemExit: the system allows fewer; the message says what to do.
    """
    needed = settings.connections + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        advice = f"raise it (ulimit -n), or set LORAINIT_CONNECTIONS to {max(1, hard - OTHER_FILES)} or less"
        raise SystemExit(f"error: this process may have {hard} files open, and {needed} are needed: {advice}.")
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class Connection(HttpToolsProtocol):
    """A connection whose request heads have limits of size and time. If there are too many, an idle one is closed."""

    _deadline: asyncio.TimerHandle | None = None
    _head = 0  # bytes received of a head that is not complete yet
    _rest = 0  # bytes of a body that arrived after its request was answered
    _refused = False
    logged_at = -LOG_SECONDS  # when "too many connections" was logged last; shared by the whole class
    since = 0.0  # when its last answer ended, or when it was opened

    # --- what uvicorn calls ---------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time limit of the first head. If there are too many connections, close the least useful one."""
        super().connection_made(transport)
        self._settings = get_settings()
        limit_unsent(transport.get_extra_info("socket"), self._settings)
        self.since = self.loop.time()
        self._expect_head()
        if len(self.connections) > self._settings.connections:
            _close_one([one for one in self.connections if isinstance(one, Connection)], now=self.since)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the time limit."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse the bytes, and apply the limits of size and time to the head of a request."""
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
        """The head is complete, so its limits no longer apply."""
        self._head = 0
        self._stop_waiting()
        if len(self.pipeline) >= PIPELINED:
            self.transport.abort()
            raise ConnectionAbortedError  # stops the parser, which may have read further requests
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Count bytes of the body that arrive after the request was answered."""
        self._head = 0
        if self.is_idle:
            self._rest += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The body is complete; the head of the next request follows."""
        self._head = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """The answer is complete; uvicorn waits for the next request if there is none yet."""
        self.since, self._rest = self.loop.time(), 0
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002  (uvicorn's words)
        """What was sent is not HTTP."""
        self._refuse(BadRequest("The request could not be read: it is not valid HTTP/1.1.", code="malformed_request"))

    # --- what is added --------------------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """No request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def worth(self) -> tuple[bool, bool]:
        """What closing it would lose: a request that is being answered, and bytes that are not sent yet."""
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
        if self._rest >= PACE * self._settings.head_seconds:  # not idle: it still sends an upload that was refused
            self._rest = 0
            self._expect_head()
        elif self._head:
            seconds = self._settings.head_seconds
            text = f"The request's head came too slowly: {self._head} bytes in {seconds:.0f} s."
            self._refuse(TooSlow(text, code="head_too_slow"))
        else:
            self.transport.close()

    def _refuse(self, refusal: Refusal) -> None:
        """Send the reason and close the connection; close it silently if the answer to another request has begun."""
        if self._refused or self.transport.is_closing():
            return
        logs.get_logger(__name__).info("connection_refused", code=refusal.code)
        if not self.is_idle:
            if self.cycle.response_started or self.pipeline:
                self.drop()
                return
            self.cycle.disconnected = True  # so that the application's own answer is not sent as well
            self.cycle.message_event.set()
        self._refused = True
        self.transport.write(_as_http(refusal))
        self.transport.write_eof()
        # Not closed at once, because a client that is still sending would get a reset and never see the reason.
        self._stop_waiting()
        self._deadline = self.loop.call_later(LINGER_SECONDS, self.transport.abort)


def _close_one(connections: Sequence[Connection], *, now: float) -> None:
    """Close one connection: an idle one if possible, of the address that has the most of these, its oldest."""
    least = min(one.worth for one in connections)
    candidates = [one for one in connections if one.worth == least]
    per_address = Counter(find_network(one.client) for one in candidates)
    if now > Connection.logged_at + LOG_SECONDS:
        Connection.logged_at = now
        logs.get_logger(__name__).warning("connections_full", connections=len(connections))
    max(candidates, key=lambda one: (per_address[find_network(one.client)], -one.since)).drop()


def _as_http(refusal: Refusal) -> bytes:
    status = status_of(refusal)
    body = json.dumps(make_error_body(refusal.message, code=refusal.code, status=status)).encode()
    headers = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    return b"".join((STATUS_LINE[status], headers.encode(), body))
