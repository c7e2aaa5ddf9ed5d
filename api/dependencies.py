"""Dependencies of routes: the caller, a session, storage, and the identity of a request that may be a retry.

A session dependency never commits: each route does so in a visible line. Sessions close before the answer is sent
(`scope="function"`), so that a slow client holds no connection. Background tasks therefore open their own.
"""

from collections.abc import Iterator
from datetime import timedelta
from typing import Annotated

from fastapi import Depends, Header, Request
from pydantic import Field
from sqlalchemy.orm import Session

from api.core.access import keys
from api.core.access.idempotency import RequestIdentity
from api.core.access.keys import Caller
from api.core.db.database import session_scope
from api.core.errors import InvalidValue
from api.core.files.storage import Storage, get_storage
from api.http import access

# The limit is only documented here. `_identity` checks it, because its message is clearer than pydantic's.
Printable = Annotated[str, Field(json_schema_extra={"maxLength": 255})]
# Seconds: a retry without a key comes within the client's read timeout (by default the second number) and some slack.
MAX_WINDOW, READ_TIMEOUT, SLACK = 900, 600, 60


def _reading() -> Iterator[Session]:
    # Readers have a session of their own kind, because SQLite's writing connection would wait for other writers.
    with session_scope(read_only=True) as session:
        yield session


def _writing() -> Iterator[Session]:
    with session_scope() as session:
        yield session


def _caller(request: Request) -> Caller:
    secret = access.read_secret(request)
    return access.authorize(request, keys.find(keys.parse_key_id(secret)), secret)


def _admin(caller: Annotated[Caller, Depends(_caller)]) -> Caller:
    keys.require_admin(caller, "This route")
    return caller


def _identity(
    request: Request,
    caller: Annotated[Caller, Depends(_caller)],
    idempotency_key: Annotated[Printable | None, Header()] = None,
    x_stainless_retry_count: Annotated[str, Header(include_in_schema=False)] = "0",
    x_stainless_read_timeout: Annotated[str, Header(include_in_schema=False)] = "",
) -> RequestIdentity:
    if idempotency_key is not None and not _printable(idempotency_key):
        raise InvalidValue(
            "Idempotency-Key must be 1 to 255 printable ASCII characters.",
            code="invalid_value",
            param="Idempotency-Key",
        )
    return RequestIdentity(
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
IdentityDep = Annotated[RequestIdentity, Depends(_identity)]
StorageDep = Annotated[Storage, Depends(get_storage)]
