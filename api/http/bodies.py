"""Parses and checks large JSON bodies in a thread, so that the event loop answers other requests meanwhile.

The schemas limit what a body may contain. This module limits how many large ones are parsed at once.
"""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError

from api import json_text
from api.errors import BadRequest, malformed

LARGE = 32 * 1024  # bytes; for a smaller body, changing to a thread and back takes longer than parsing
AT_ONCE = 2  # few, because each uses a processor


class BoundedBody(APIRoute):
    """A route whose JSON body does not block the event loop."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The framework's handler, with a request that knows the model of its body."""
        answer = super().get_route_handler()
        kind = None if self.body_field is None else self.body_field.field_info.annotation
        if kind is None:
            return answer
        model = TypeAdapter[Any](kind)
        threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="large-body")

        async def handle(request: Request) -> Response:
            return await answer(_Request(request, model, threads))

        return handle


class _Request(Request):
    """The same request. For a large body, `json()` returns the finished model, which the framework accepts."""

    def __init__(self, request: Request, model: TypeAdapter[Any], threads: Executor) -> None:
        super().__init__(request.scope, request.receive)
        self._model, self._threads = model, threads

    async def json(self) -> Any:
        """The body as JSON, or its model.

        Raises:
            BadRequest: a large body does not fit the model, or a body is not UTF-8 or has a key twice.
            json.JSONDecodeError: it is not JSON.
        """
        raw = await self.body()
        if len(raw) <= LARGE:
            return _parsed(raw)
        return await asyncio.get_running_loop().run_in_executor(self._threads, _model_of, raw, self._model)


def _parsed(raw: bytes) -> Any:
    try:
        return json_text.parse(raw)
    except json_text.Ambiguous as error:
        text = f"The body is ambiguous: {error}. Give it once."
        raise BadRequest(text, code="invalid_json", param=error.key) from error
    except UnicodeDecodeError as error:
        text = f"The body is not valid JSON: it must be UTF-8, and byte {error.start} is not."
        raise BadRequest(text, code="invalid_json") from error


def _model_of(raw: bytes, model: TypeAdapter[Any]) -> Any:
    given = _parsed(raw)
    try:
        return model.validate_python(given)
    except ValidationError as error:
        found = [{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors(include_url=False)]
        raise malformed(found, given) from None
