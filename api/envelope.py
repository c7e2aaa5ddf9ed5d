"""Around every request: an id, a clock, a size limit on bodies, one log line, and a 500 in our shape.

A plain ASGI layer, because the framework's own handler for unhandled exceptions answers text
without a request id, and its body limit answers text too.
"""

import time
from contextvars import Token
from typing import Any

import structlog
from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.core import logs
from api.core.errors import TooLarge
from api.core.files import too_large
from api.core.ids import new_id
from api.core.settings import Settings
from api.errors import error_body, respond
from api.exposition import Requests

# A multipart body is a little larger than the file in it.
MULTIPART_SLACK = 64 * 1024
_UPLOAD = ("POST", "/v1/files")


class Envelope:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, settings: Settings, requests: Requests) -> None:
        self.app = app
        self.settings = settings
        self.requests = requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self.settings, self.requests)
        tokens = structlog.contextvars.bind_contextvars(request_id=exchange.request_id)
        try:
            await exchange.run(self.app)
        finally:
            _unbind(tokens)


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, settings: Settings, requests: Requests) -> None:
        self.scope, self._receive, self._send = scope, receive, send
        self._requests = requests
        self.request_id = new_id("req_")
        self.organization = settings.organization
        self.started = time.perf_counter()
        self.status: int | None = None
        self.received = 0
        self.refusal = _limit(scope, settings)
        scope.setdefault("state", {})["request_id"] = self.request_id

    async def run(self, app: ASGIApp) -> None:
        try:
            if _declared(self.scope) > self.refusal.limit:
                await respond(self.refusal.error)(self.scope, self._receive, self.send)
            else:
                await app(self.scope, self.receive, self.send)
        except ClientDisconnect:
            self.status = self.status or 499
        except Exception as error:
            logs.get_logger(__name__).error("unhandled", exc_info=error)
            if self.status is not None:
                raise
            await self._internal_error()(self.scope, self._receive, self.send)
        finally:
            self._log()

    async def receive(self) -> Message:
        message = await self._receive()
        self.received += len(message.get("body", b""))
        if self.received > self.refusal.limit:
            raise self.refusal.error
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            headers["openai-organization"] = f"org-{self.organization}"
            headers["openai-processing-ms"] = str(self._milliseconds())
        await self._send(message)

    def _internal_error(self) -> JSONResponse:
        message = f"The server made an error; the operator finds it in the log under {self.request_id}."
        return JSONResponse(error_body(message, code="internal_error", status=500), status_code=500)

    def _log(self) -> None:
        route = self.scope.get("route")
        seconds = time.perf_counter() - self.started
        self._requests.observe(self.scope["method"], getattr(route, "path", None), self.status, seconds)
        logs.get_logger(__name__).info(
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


class _Limit:
    """How large this request's body may be, and what is said when it is larger."""

    def __init__(self, limit: int, error: TooLarge) -> None:
        self.limit = limit
        self.error = error


def _limit(scope: Scope, settings: Settings) -> _Limit:
    if (scope["method"], scope["path"]) == _UPLOAD:
        return _Limit(settings.max_upload_bytes + MULTIPART_SLACK, too_large(settings.max_upload_bytes))
    limit = settings.max_body_bytes
    return _Limit(limit, TooLarge(f"The body is larger than {limit} bytes.", code="request_too_large"))


def _declared(scope: Scope) -> int:
    text = Headers(scope=scope).get("content-length", "0")
    return int(text) if text.isascii() and text.isdecimal() else 0


def _unbind(tokens: "Any | dict[str, Token[Any]]") -> None:
    structlog.contextvars.reset_contextvars(**tokens)


def request_id(request: Request) -> str:
    """The id of the request being answered."""
    return str(request.scope["state"]["request_id"])
