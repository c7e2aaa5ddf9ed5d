"""JSON bodies: a large one is parsed and checked in a thread, so that the loop answers others meanwhile.

The schemas bound what a body may hold; this bounds how many large ones are taken apart at once.
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

LARGE = 32 * 1024  # bytes; below, going to a thread and back costs more than what is done there
AT_ONCE = 2


class BoundedBody(APIRoute):
    """A route whose JSON body does not stop the loop."""

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
    """The same request; of a large body `json()` is the model that it makes, which the framework takes as it is."""

    def __init__(self, request: Request, model: TypeAdapter[Any], threads: Executor) -> None:
        super().__init__(request.scope, request.receive)
        self._model, self._threads = model, threads

    async def json(self) -> Any:
        """The body as JSON, or its model.

        Raises:
            BadRequest: no model can be made of a large body; it is not UTF-8, or has a key twice.
            json.JSONDecodeError: it is no JSON.
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
