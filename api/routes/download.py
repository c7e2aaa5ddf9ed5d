"""Sends one file over HTTP, with ETag, ranges and conditions, and without compression.

Storage is read after the route has returned, so that no database session is open during a slow download.
"""

import base64
import re
import time
from typing import Any, Literal

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from api.core.db.tables import File
from api.core.files import files
from api.core.files.storage import Storage
from api.errors import OutOfRange, respond
from api.http import download_memory
from api.http.download_memory import DownloadMemory
from api.http.threads import run_in_storage_thread
from api.schemas.wire import ErrorBody

_BINARY = {"*/*": {"schema": {"type": "string", "format": "binary"}}}
BYTES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The bytes.", "content": _BINARY},
    206: {"description": "The range asked for.", "content": _BINARY},
    304: {"description": "`If-None-Match` names the bytes there are."},
    416: {"description": "The range lies outside the file.", "model": ErrorBody},
}
PIECE = 64 * 1024  # as much as the server's transport buffers before `send` waits
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


class Download(StreamingResponse):
    """The bytes [start, end) of a file. The first ones are read before the answer begins, so that a failure is an error
    answer.

    A block is sent in pieces, and each of them waits until the one before is almost sent.
    """

    def __init__(
        self, storage: Storage, file: File, *, start: int, end: int, status_code: int, headers: dict[str, str]
    ) -> None:
        super().__init__((), status_code=status_code, headers=headers)
        self._storage, self._file, self._start, self._end = storage, file, start, end
        self._first = b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the first bytes, then answer."""
        self._memory: DownloadMemory = scope["app"].state.download_memory
        self._first = await self._read(self._start, download_memory.SMALL)
        await super().__call__(scope, receive, send)

    async def stream_response(self, send: Send) -> None:
        """Send one block after the other."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        position, size = self._start, download_memory.SMALL
        while position < self._end:
            with self._memory.block(size) as allowed:
                position, size = await self._pass_on(position, allowed, send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pass_on(self, start: int, size: int, send: Send) -> tuple[int, int]:
        """Send so many bytes from `start` on. Returns where the next block begins, and its size."""
        block, self._first = self._first or await self._read(start, size), b""
        begun = time.monotonic()
        for offset in range(0, len(block), PIECE):
            # The slice is a copy, so that a piece which waits does not keep the whole block in memory.
            await send({"type": "http.response.body", "body": block[offset : offset + PIECE], "more_body": True})
        return start + len(block), download_memory.next_block_size(len(block), seconds=time.monotonic() - begun)

    async def _read(self, start: int, size: int) -> bytes:
        end = min(start + size, self._end)
        return await run_in_storage_thread(files.read, self._storage, self._file, start=start, end=end)


def download(
    request: Request, storage: Storage, file: File, *, media_type: str, name: str, digest: bool = False
) -> Response:
    """Answer a GET or HEAD for the bytes of `file`."""
    etag = f'"{file.sha256}"'
    headers = {
        "etag": etag,
        "accept-ranges": "bytes",
        "content-type": media_type,
        "content-disposition": f'attachment; filename="{_ascii(name)}"',
    }
    if digest:  # so that a client can check the whole file, even if it came in ranges
        headers["repr-digest"] = f"sha-256=:{base64.b64encode(bytes.fromhex(file.sha256)).decode()}:"
    if _matches(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    span = _span(request, etag, file.bytes)
    if span == "outside":
        text = f"Range {request.headers['range']!r} lies outside the {file.bytes} bytes of this file."
        refusal = OutOfRange(text, code="range_not_satisfiable", param="Range")
        return respond(refusal, {"content-range": f"bytes */{file.bytes}"})
    start, end = (0, file.bytes) if span is None else span
    headers["content-length"] = str(end - start)
    if span is not None:
        headers["content-range"] = f"bytes {start}-{end - 1}/{file.bytes}"
    status = 200 if span is None else 206
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers)
    return Download(storage, file, start=start, end=end, status_code=status, headers=headers)


def _span(request: Request, etag: str, size: int) -> tuple[int, int] | Literal["outside"] | None:
    """[start, end) of the one range asked for; None = everything."""
    condition = request.headers.get("if-range")
    wanted = _RANGE.fullmatch(request.headers.get("range", "").strip())
    if wanted is None or wanted[0] == "bytes=-" or (condition is not None and condition.strip() != etag):
        return None  # no range, several or malformed ones, or the client has a part of other bytes
    first, last = wanted[1], wanted[2]
    if first == "":
        start, end = max(0, size - int(last)), size
    else:
        start, end = int(first), min(size, int(last) + 1) if last else size
        if last and int(last) < start:
            return None
    return (start, end) if start < end else "outside"


def _matches(condition: str | None, etag: str) -> bool:
    if condition is None:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in condition.split(",")]
    return "*" in tags or etag in tags


def _ascii(name: str) -> str:
    # Headers are ASCII, and a quote or a line break in a name would end the header's value.
    return re.sub(r"[^A-Za-z0-9 ._()+-]", "_", name)
