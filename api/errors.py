"""All errors of the API, in OpenAI's format. The codes are a closed list in this file.

Refusal (api.core.errors)      status
├── NotFound                   404
├── BadReference, WrongState,
│   InvalidValue               400
├── TooLarge                   413
├── Forbidden                  403
├── StorageFull, QuotaExceeded 429   (x-should-retry: false)
├── InProgress                 409   (clients retry this status, and here a retry is right)
├── Unavailable                503
└── only over HTTP:
    ├── Overloaded             503
    ├── BadRequest             400
    ├── Unauthenticated        401
    ├── WrongVerb              405
    ├── TooManyRequests        429   (retry-after: a retry helps)
    ├── TooSlow                400   (connection: close)
    ├── HeadTooLarge           431
    └── OutOfRange             416
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from obstore.exceptions import BaseError as StoreError
from sqlalchemy.exc import DataError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from api.core import logs
from api.core.errors import (
    BadReference,
    Forbidden,
    InProgress,
    InvalidValue,
    NotFound,
    QuotaExceeded,
    Refusal,
    StorageFull,
    TooLarge,
    Unavailable,
    WrongState,
)
from api.core.files import disk
from api.invalid import find_first_fault
from api.planned_routes import RouteTable, find_planned


class BadRequest(Refusal):
    """The request itself is malformed."""


class Unauthenticated(Refusal):
    """No key, or one that is not valid here."""


class TooManyRequests(Refusal):
    """Too many requests for a limit; a retry is possible after `wait` seconds."""

    def __init__(self, message: str, *, code: str, wait: float) -> None:
        super().__init__(message, code=code)
        self.wait = wait


class TooSlow(Refusal):
    """The head or the body arrives too slowly, and the rest is not waited for."""


class HeadTooLarge(Refusal):
    """Request line and headers are larger than is accepted."""


class Overloaded(Unavailable):
    """The server has as many requests as it can answer; a retry in a few seconds may help."""


class WrongVerb(Refusal):
    """The path exists, the verb does not."""


class OutOfRange(Refusal):
    """The byte range lies outside the file."""


STATUS: Mapping[type[Refusal], int] = {
    NotFound: 404,
    BadReference: 400,
    WrongState: 400,
    InvalidValue: 400,
    TooLarge: 413,
    StorageFull: 429,
    QuotaExceeded: 429,
    Forbidden: 403,
    InProgress: 409,
    Unavailable: 503,
    BadRequest: 400,
    Unauthenticated: 401,
    WrongVerb: 405,
    TooManyRequests: 429,
    TooSlow: 400,
    HeadTooLarge: 431,
    Overloaded: 503,
    OutOfRange: 416,
}

# Every code, with every status that it may have. A new one needs a meaning in docs/generate/meanings.py, too.
CODES: Mapping[str, tuple[int, ...]] = {
    "missing_api_key": (401,),
    "invalid_api_key": (401,),
    "mismatched_project": (401,),
    "insufficient_permissions": (403,),
    "project_not_found": (404,),
    "key_not_found": (404,),
    "fine_tune_not_found": (404,),
    "experiment_not_found": (404,),
    "file_not_found": (400, 404),
    "model_not_found": (404,),
    "model_not_available": (400,),
    "checkpoint_not_found": (404,),
    "unsupported_endpoint": (404,),
    "method_not_allowed": (405,),
    "invalid_json": (400,),
    "missing_required_parameter": (400,),
    "unknown_parameter": (400,),
    "invalid_type": (400,),
    "invalid_value": (400,),
    "not_supported": (400,),
    "unsupported_method": (400,),
    "unsupported_init_method": (400, 404),
    "unsupported_combination": (400,),
    "rank_too_large": (400,),
    "invalid_training_file": (400,),
    "invalid_validation_file": (400,),
    "invalid_file_purpose": (400,),
    "file_in_use": (400,),
    "file_expired": (400,),
    "invalid_job_state": (400,),
    "job_not_resumable": (400,),
    "adapter_not_ready": (400,),
    "model_not_deletable": (400,),
    "integration_not_configured": (400,),
    "idempotency_key_reused": (400,),
    "idempotency_in_progress": (409,),
    "file_too_large": (413,),
    "request_too_large": (413,),
    "range_not_satisfiable": (416,),
    "body_too_slow": (400,),
    "head_too_slow": (400,),
    "head_too_large": (431,),
    "malformed_request": (400,),
    "rate_limit_exceeded": (429,),
    "quota_exceeded": (429,),
    "insufficient_storage": (429,),
    "queue_full": (429,),
    "internal_error": (500,),
    "not_ready": (503,),
    "overloaded": (503,),
}


# No more errors of one request are looked at, because a large body may have millions. Those of one field are adjacent.
LOOKED_AT = 100

_ADVICE: Mapping[int, Mapping[str, str]] = {
    401: {"www-authenticate": "Bearer"},
    409: {"retry-after-ms": "500"},
    429: {"x-should-retry": "false"},
    503: {"retry-after": "2"},
}


def status_of(refusal: Refusal) -> int:
    """The HTTP status of a refusal: its class decides."""
    return next(STATUS[kind] for kind in type(refusal).__mro__ if kind in STATUS)


def make_error_body(
    message: str, *, code: str, status: int, param: str | None = None
) -> dict[str, dict[str, str | None]]:
    """The body of every answer that is not a success.

    The message names the field, too, because clients print only the message.
    """
    if status == 400 and param and param not in message:
        message = f"{param}: {message}"
    kind = "server_error" if status >= 500 else "insufficient_quota" if status == 429 else "invalid_request_error"
    kind = "requests" if code == "rate_limit_exceeded" else kind
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def respond(refusal: Refusal, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """A refusal as a response, with headers that say whether and when a retry makes sense."""
    status = status_of(refusal)
    body = make_error_body(refusal.message, code=refusal.code, status=status, param=refusal.param)
    return JSONResponse(body, status_code=status, headers={**_advice(refusal, status), **(headers or {})})


def _advice(refusal: Refusal, status: int) -> dict[str, str]:
    if isinstance(refusal, TooManyRequests):
        return {"retry-after": str(math.ceil(refusal.wait)), "retry-after-ms": str(math.ceil(refusal.wait * 1000))}
    if isinstance(refusal, TooSlow):
        return {"connection": "close"}  # otherwise the server would read the rest of the body
    return dict(_ADVICE.get(status, {}))


def malformed(errors: Sequence[Mapping[str, Any]], body: Any) -> BadRequest:
    """The refusal of a request that pydantic found these errors in; it names the first."""
    fault = find_first_fault(errors[:LOOKED_AT], body)
    return BadRequest(fault.message, code=fault.code, param=fault.param)


def install(app: FastAPI) -> None:
    """Answer all errors in our format. Unhandled exceptions are answered in `api.middleware`, with the request's id."""

    @app.exception_handler(Refusal)
    def refused(_: Request, error: Refusal) -> JSONResponse:
        return respond(error)

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return respond(malformed(error.errors(), error.body))

    @app.exception_handler(HTTPException)
    def refused_by_framework(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error.__cause__, Refusal):  # raised while the body was being read
            return respond(error.__cause__)
        if error.status_code in (404, 405):
            return _no_such_route(request, error)
        return respond(BadRequest(f"The body could not be read: {error.detail}.", code="invalid_json"))

    @app.exception_handler(DataError)
    @app.exception_handler(UnicodeEncodeError)
    def unstorable(_: Request, error: Exception) -> JSONResponse:
        logs.get_logger(__name__).info("unstorable_text", error=type(error).__name__)
        message = "The request holds text that cannot be stored (a NUL character or half a surrogate pair)."
        return respond(BadRequest(message, code="invalid_value"))

    @app.exception_handler(OperationalError)
    @app.exception_handler(InterfaceError)
    @app.exception_handler(PoolTimeout)
    def database_down(_: Request, error: Exception) -> JSONResponse:
        logs.get_logger(__name__).warning("database_unavailable", error=str(error))
        if disk.is_full(error):
            return respond(_full())
        return respond(Unavailable("The database cannot be reached; try again shortly.", code="not_ready"))

    @app.exception_handler(InternalError)
    def ended_by_the_database(request: Request, error: InternalError) -> JSONResponse:
        if not error.connection_invalidated:
            raise error
        return database_down(request, error)  # PostgreSQL ended a transaction that was idle for too long

    @app.exception_handler(StoreError)
    def storage_down(_: Request, error: Exception) -> JSONResponse:
        logs.get_logger(__name__).warning("storage_unavailable", error=str(error))
        if disk.is_full(error):
            return respond(_full())
        return respond(Unavailable("Storage cannot be reached; try again shortly.", code="not_ready"))

    @app.exception_handler(OSError)
    def no_room(_: Request, error: OSError) -> JSONResponse:
        if not disk.is_full(error):
            raise error
        logs.get_logger(__name__).error("disk_full", error=str(error))
        return respond(_full())


def _full() -> StorageFull:
    message = "A disk of the server is full, and nothing was stored. Its operator has to free space."
    return StorageFull(message, code="insufficient_storage")


def _no_such_route(request: Request, error: HTTPException) -> JSONResponse:
    routes: RouteTable = request.app.state.table
    path: str = request.scope["path"]  # a URL would lose a line break, and then name a route that exists
    later = find_planned(request.method, path, routes)
    if later is not None:
        return respond(later)
    verbs = routes.verbs(path)
    if error.status_code == 405 or verbs:
        allowed = ", ".join(sorted(verbs))
        message = f"{request.method} is not possible on {path}. Possible: {allowed}."
        return respond(WrongVerb(message, code="method_not_allowed"), {"allow": allowed})
    if (meant := _with_v1(request.method, path, routes)) is not None:
        message = f"{path} does not exist and {meant} does: the base URL of this API ends in /v1."
        return respond(NotFound(message, code="unsupported_endpoint"))
    if routes.verbs(request.scope.get("raw_path", b"").decode("latin-1")):
        message = f"{request.method} {path} does not exist: ids contain no slash."
        return respond(NotFound(message, code="unsupported_endpoint"))
    known = ", ".join(routes.paths())
    message = f"{request.method} {path} does not exist. Routes: {known}."
    return respond(NotFound(message, code="unsupported_endpoint"))


def _with_v1(verb: str, path: str, routes: RouteTable) -> str | None:
    """The path under /v1 that was probably meant: the base URL has another version, a prefix, or no version."""
    rest = re.sub(r"^(/[^/]+){0,3}/v\d+(?=/)", "", path)
    meant = f"/v1{rest}"
    return meant if meant != path and (routes.verbs(meant) or find_planned(verb, meant, routes)) else None
