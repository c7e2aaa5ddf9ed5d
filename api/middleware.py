"""Around every request: an id, its duration, limits on its body, one log line, and a 500 in our format.

It is a plain ASGI layer, because the framework's own handlers for unhandled exceptions and for large bodies answer in
plain text without a request id.
"""

import asyncio
import time

import structlog
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.core import logs
from api.core.access.rate_limits import Allowance
from api.core.errors import Refusal, TooLarge
from api.core.files.files import too_large
from api.core.ids import new_id
from api.core.settings import Settings
from api.errors import TooSlow, make_error_body, respond
from api.http.concurrency import Concurrency, Permit
from api.http.exposition import Requests

# Added to the limit of uploads, because a multipart body is a little larger than the file in it.
MULTIPART_SLACK = 64 * 1024
# The lowest speed of a body that is accepted, in bytes per second: 128 kbit/s. There is one, because a body that comes
# slowly holds a thread and a file on our disk.
PACE = 16 * 1024
_UPLOAD = ("POST", "/v1/files")


class RequestMiddleware:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, settings: Settings, requests: Requests) -> None:
        self.app = app
        self.settings = settings
        self.concurrency = Concurrency(settings)
        self.requests = requests
        self.log = logs.get_logger(__name__)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self)
        tokens = structlog.contextvars.bind_contextvars(request_id=exchange.request_id)
        permit = self.concurrency.acquire(scope)
        try:
            await exchange.run(self.app, permit)
        finally:
            structlog.contextvars.reset_contextvars(**tokens)
            if isinstance(permit, Permit):
                permit.release()


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, middleware: RequestMiddleware) -> None:
        settings = middleware.settings
        self.scope, self._receive, self._send = scope, receive, send
        self._requests, self._logger = middleware.requests, middleware.log
        self.request_id = new_id("req_")
        self.organization = settings.organization
        self.started = time.perf_counter()
        self.status: int | None = None
        self.received, self.waited, self.complete = 0, 0.0, False
        self.body_seconds = settings.body_seconds
        self.refusal = _limit(scope, settings)
        scope.setdefault("state", {})["request_id"] = self.request_id

    async def run(self, app: ASGIApp, permit: Permit | Refusal) -> None:
        self.scope["state"]["permit"] = permit
        try:
            if isinstance(permit, Refusal):
                await respond(permit)(self.scope, self._receive, self.send)
            elif read_content_length(self.scope) > self.refusal.limit:  # before reading it, so that it costs nothing
                await respond(self.refusal.error)(self.scope, self._receive, self.send)
            else:
                await app(self.scope, self.receive, self.send)
        except ClientDisconnect:  # no error, because nobody is left to receive an answer
            self.status = self.status or 499
        except Exception:
            self._logger.exception("unhandled")
            if self.status is not None:  # the answer has begun, so its connection has to be closed
                raise
            await self._internal_error()(self.scope, self._receive, self.send)
        finally:
            self._log()

    async def receive(self) -> Message:
        if self.complete:  # after the body only a disconnect can come, so there is no time limit
            return await self._receive()
        message = await self._wait()
        self.complete = not message.get("more_body", False)
        self.received += len(message.get("body", b""))
        if self.received > self.refusal.limit:
            raise self.refusal.error
        return message

    async def _wait(self) -> Message:
        """The next part of the body. Only waiting counts against the limit, so that our own slow disk does not."""
        left = self.body_seconds + self.received / PACE - self.waited
        start = time.perf_counter()
        try:
            async with asyncio.timeout(max(0.0, left)):
                return await self._receive()
        except TimeoutError as error:
            text = f"The body came too slowly: {self.received} bytes in {self.waited + left:.0f} s of waiting."
            raise TooSlow(text, code="body_too_slow") from error
        finally:
            self.waited += time.perf_counter() - start

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            headers["openai-organization"] = f"org-{self.organization}"
            headers["openai-processing-ms"] = str(self._milliseconds())
            headers.update(_limits(self.scope["state"].get("allowance")))
        await self._send(message)

    def _internal_error(self) -> JSONResponse:
        message = f"The server failed; its operator finds the error in the log under {self.request_id}."
        return JSONResponse(make_error_body(message, code="internal_error", status=500), status_code=500)

    def _log(self) -> None:
        route = self.scope.get("route")
        seconds = time.perf_counter() - self.started
        self._requests.observe(self.scope["method"], getattr(route, "path", None), self.status, seconds)
        self._logger.info(
            "request",
            method=self.scope["method"],
            route=getattr(route, "path", None),
            status=self.status,
            milliseconds=self._milliseconds(),
            project=self.scope["state"].get("project"),
            client=Headers(scope=self.scope).get("user-agent"),
        )

    def _milliseconds(self) -> int:
        return round((time.perf_counter() - self.started) * 1000)


def _limits(allowance: Allowance | None) -> dict[str, str]:
    """The key's rate limit in OpenAI's headers; none if there is no limit."""
    if allowance is None:
        return {}
    values = {"limit": allowance.limit, "remaining": allowance.remaining, "reset": _duration(allowance.reset)}
    return {f"x-ratelimit-{name}-requests": str(value) for name, value in values.items()}


def _duration(seconds: float) -> str:
    """As OpenAI writes it: `120ms`, `8.64s`, `1m0s`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    minutes, rest = divmod(seconds, 60)
    return f"{minutes:.0f}m{rest:.0f}s" if minutes else f"{rest:.4g}s"


class _Limit:
    """How large this request's body may be, and the error if it is larger."""

    def __init__(self, limit: int, error: TooLarge) -> None:
        self.limit = limit
        self.error = error


def _limit(scope: Scope, settings: Settings) -> _Limit:
    if (scope["method"], scope["path"]) == _UPLOAD:
        return _Limit(settings.max_upload_bytes + MULTIPART_SLACK, too_large(settings.max_upload_bytes))
    limit = settings.max_body_bytes
    return _Limit(limit, TooLarge(f"The body is larger than {limit} bytes.", code="request_too_large"))


def read_content_length(scope: Scope) -> int:
    """The size of the body in bytes as the request declares it; 0 if it does not.

    The bytes are counted as well while they come, because a request may declare no size.
    """
    text = Headers(scope=scope).get("content-length", "0")
    return int(text) if text.isascii() and text.isdecimal() else 0
