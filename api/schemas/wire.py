"""What all answers share: lists, errors, Unix times, and numbers that JSON can represent."""

import math
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import chain
from typing import Any, Generic, Literal, TypeVar

from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict


class Wire(BaseModel):
    """An answer: every documented field is present, null where there is no value."""

    model_config = ConfigDict(frozen=True)


class Element(Wire):
    """An answer that can stand in a list."""

    id: str


T = TypeVar("T", bound=Element)


class Page(Wire, Generic[T]):
    """A list. `last_id` and `has_more` are always there: clients page by them."""

    object: Literal["list"] = "list"
    data: list[T]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(Wire):
    """The answer to a delete."""

    id: str
    object: Literal["experiment", "file", "model", "organization.project.api_key.deleted"]
    deleted: Literal[True] = True


class ErrorDetail(Wire):
    """What went wrong: a sentence, the kind, the field, a code from the closed list."""

    message: str
    type: Literal["invalid_request_error", "requests", "insufficient_quota", "server_error"]
    param: str | None
    code: str


class ErrorBody(Wire):
    """The body of every answer that is not a success."""

    error: ErrorDetail


# What the routes below /v1 and the others may answer, whatever they do. A route lists its own answers itself.
V1_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 403, 404, 413, 429, 500, 503)
}
OTHER_RESPONSES: dict[int | str, dict[str, Any]] = {status: {"model": ErrorBody} for status in (500, 503)}
# Answers of the idempotent routes (`api.core.access.idempotency`).
IDEMPOTENT_RESPONSES: dict[int | str, dict[str, Any]] = {
    409: {"model": ErrorBody, "description": "The first request with this identity is still being carried out."}
}


def make_page(rows: Sequence[T], *, has_more: bool) -> Page[T]:
    """A list of `rows`."""
    return Page(
        data=list(rows),
        first_id=rows[0].id if rows else None,
        last_id=rows[-1].id if rows else None,
        has_more=has_more,
    )


def as_json(answer: Wire) -> Response:
    """An encoded answer. It is made in the route's thread, because the framework would use a second thread for it."""
    return Response(answer.model_dump_json(), media_type="application/json")


def stream_list(batches: Iterator[Sequence[Element]]) -> Response:
    """A complete list, sent while it is read, so that only one batch is in memory however slow the client is.

    The first batch is read before the answer begins, so that an error is still an error answer. A later error closes
    the connection in the middle of the list, which clients notice.
    """
    parts = _parts(batches)
    return StreamingResponse(chain([next(parts)], parts), media_type="application/json")


def _parts(batches: Iterator[Sequence[Element]]) -> Iterator[bytes]:
    first = last = None
    opening, _ = _around(None, None)
    for batch in filter(None, batches):
        yield opening + b",".join(element.model_dump_json().encode() for element in batch)
        opening, first, last = b",", first or batch[0].id, batch[-1].id
    yield (opening if first is None else b"") + _around(first, last)[1]


def _around(first_id: str | None, last_id: str | None) -> list[bytes]:
    """The text before the elements of a complete list, and the text after them."""
    empty = Page[Element](data=[], first_id=first_id, last_id=last_id, has_more=False).model_dump_json()
    before, _, after = empty.partition("[]")
    return [f"{before}[".encode(), f"]{after}".encode()]


def to_unix(at: datetime) -> int:
    """Whole seconds since 1970."""
    return int(at.timestamp())


def to_unix_or_none(at: datetime | None) -> int | None:
    """Like `to_unix`; None stays None."""
    return None if at is None else to_unix(at)


def replace_non_finite(value: Any) -> Any:
    """`value` with every NaN and infinity replaced by None, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: replace_non_finite(item) for key, item in value.items()}
    return [replace_non_finite(item) for item in value] if isinstance(value, list) else value
