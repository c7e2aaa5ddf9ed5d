"""What a route may ask for: the caller, a session, storage, and how often this was sent.

A session dependency never commits: that is a visible line in the route. Sessions close before the
answer leaves (`scope="function"`), so what runs after it opens its own.
"""

from collections.abc import Iterator
from datetime import timedelta
from typing import Annotated

from fastapi import Depends, Header, Request
from pydantic import Field
from sqlalchemy.orm import Session

from api.core import keys, rates
from api.core.db import session_scope
from api.core.errors import InvalidValue
from api.core.idempotency import Attempt
from api.core.keys import Caller
from api.core.models import Project
from api.core.storage import Storage, get_storage
from api.errors import TooManyRequests, Unauthenticated

# Checked here, and told in words of our own.
Printable = Annotated[str, Field(json_schema_extra={"maxLength": 255})]
MAX_WINDOW, READ_TIMEOUT, SLACK = 900, 600, 60


def _reading() -> Iterator[Session]:
    with session_scope(read_only=True) as session:
        yield session


def _writing() -> Iterator[Session]:
    with session_scope() as session:
        yield session


def _authenticated(
    request: Request,
    authorization: Annotated[str | None, Header(include_in_schema=False)] = None,
    openai_project: Annotated[str | None, Header(include_in_schema=False)] = None,
) -> Caller:
    scheme, _, secret = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not secret.strip():
        raise Unauthenticated(
            "You didn't provide an API key: send it as 'Authorization: Bearer sk-lorainit-...'.", code="missing_api_key"
        )
    with session_scope(read_only=True) as session:
        caller = keys.authenticate(session, secret.strip())
        if caller is None:
            raise Unauthenticated(
                f"Incorrect API key provided: {_hint(secret.strip())}. It is unknown, expired or deleted.",
                code="invalid_api_key",
            )
        # A project id this server does not know is somebody's hosted one, left in the environment.
        foreign = openai_project not in (None, "", caller.project_id) and "\x00" not in (openai_project or "")
        if foreign and session.get(Project, openai_project) is not None:
            raise Unauthenticated(
                f"OpenAI-Project {openai_project!r} is not the project of this API key.", code="mismatched_project"
            )
    request.scope["state"]["project"] = caller.project_id
    return caller


def _caller(request: Request, caller: Annotated[Caller, Depends(_authenticated)]) -> Caller:
    """Whoever asks, within what the key may ask for; `api.envelope` writes the allowance into the headers."""
    limiter = rates.get_limiter()
    allowance = request.scope["state"]["allowance"] = None if limiter is None else limiter.take(caller.key_id)
    if allowance is not None and allowance.wait:
        raise TooManyRequests(
            f"Rate limit reached for this API key: {allowance.limit} requests per minute."
            f" Please try again in {allowance.wait:.2g} s.",
            code="rate_limit_exceeded",
            wait=allowance.wait,
        )
    return caller


def _admin(caller: Annotated[Caller, Depends(_caller)]) -> Caller:
    keys.require_admin(caller, "This route")
    return caller


def _hint(secret: str) -> str:
    return f"{secret[:12]}...{secret[-4:]}" if len(secret) > 24 else "too short"


def _attempt(
    request: Request,
    caller: Annotated[Caller, Depends(_caller)],
    idempotency_key: Annotated[Printable | None, Header()] = None,
    x_stainless_retry_count: Annotated[str, Header(include_in_schema=False)] = "0",
    x_stainless_read_timeout: Annotated[str, Header(include_in_schema=False)] = "",
) -> Attempt:
    if idempotency_key is not None and not _printable(idempotency_key):
        raise InvalidValue(
            "Idempotency-Key must be 1 to 255 printable ASCII characters.",
            code="invalid_value",
            param="Idempotency-Key",
        )
    return Attempt(
        caller=caller,
        path=request.url.path,
        key=idempotency_key,
        retry_count=_number(x_stainless_retry_count, 0),
        window=timedelta(seconds=min(MAX_WINDOW, _number(x_stainless_read_timeout, READ_TIMEOUT) + SLACK)),
    )


def _printable(key: str) -> bool:
    return 1 <= len(key) <= 255 and key.isascii() and key.isprintable()


def _number(text: str, default: int) -> int:
    head = text.partition(".")[0]
    return int(head) if head.isascii() and head.isdecimal() and len(head) <= 9 else default


Reading = Annotated[Session, Depends(_reading, scope="function")]
Writing = Annotated[Session, Depends(_writing, scope="function")]
CallerDep = Annotated[Caller, Depends(_caller)]
AdminDep = Annotated[Caller, Depends(_admin)]
AttemptDep = Annotated[Attempt, Depends(_attempt)]
StorageDep = Annotated[Storage, Depends(get_storage)]
