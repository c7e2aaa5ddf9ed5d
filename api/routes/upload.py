"""The multipart body of `POST /v1/files`. The caller is checked first; then the file is spooled to disk, not memory."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import PureWindowsPath
from typing import Annotated, Any, BinaryIO

from fastapi import Depends, Request
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from api.core.db.database import session_scope
from api.core.errors import InvalidValue
from api.core.files import files, quota
from api.core.files.files import UPLOADABLE, Stored
from api.core.settings import get_settings
from api.dependencies import IdentityDep, StorageDep
from api.errors import BadRequest
from api.http.threads import run_in_storage_thread
from api.middleware import MULTIPART_SLACK, read_content_length

FIELD_BYTES = 64 * 1024  # of a field that is no file, because the parser keeps these in memory
LIFETIME = (3600, 2_592_000)
_FIELDS = ("file", "purpose", "expires_after[anchor]", "expires_after[seconds]")

SCHEMA: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "contentMediaType": "application/octet-stream"},
                        "purpose": {"enum": list(UPLOADABLE)},
                        "expires_after[anchor]": {"const": "created_at"},
                        "expires_after[seconds]": {"type": "integer", "minimum": LIFETIME[0], "maximum": LIFETIME[1]},
                    },
                }
            }
        },
    }
}


@dataclass(frozen=True)
class Upload:
    """A complete upload, in a temporary file."""

    stream: BinaryIO
    filename: str
    purpose: str
    lifetime: int | None


def _quota(request: Request, attempt: IdentityDep) -> None:
    """Refuse an upload that cannot fit before it is read. Its exact size is known and counted afterwards."""
    if attempt.is_retry or attempt.key:
        return  # it may repeat an upload that is stored already, and then adds nothing
    with session_scope(read_only=True) as session:
        quota.require_quota(
            session, attempt.caller.project_id, adding=max(0, read_content_length(request.scope) - MULTIPART_SLACK)
        )


async def _upload(request: Request, _: Annotated[None, Depends(_quota)]) -> AsyncIterator[Upload]:
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        yield _read(FormData())
        return
    parser = MultiPartParser(request.headers, request.stream(), max_files=1, max_fields=8, max_part_size=FIELD_BYTES)
    try:
        yield _read(await parser.parse())
    except MultiPartException as error:
        text = f"file: the upload could not be read: {error.message}"
        raise BadRequest(text, code="invalid_value", param="file") from error
    finally:
        # Needed if the body was cut off, because then the temporary file belongs to no form and nothing else closes it.
        for spool in parser._files_to_close_on_error:
            spool.close()


def _read(form: FormData) -> Upload:
    for name in form:
        if name not in _FIELDS:
            raise BadRequest(f"{name} is not a known field.", code="unknown_parameter", param=name)
    file, purpose = form.get("file"), form.get("purpose")
    for name, value in (("file", file), ("purpose", purpose)):
        if value is None:
            raise BadRequest(f"{name} is required.", code="missing_required_parameter", param=name)
    if not isinstance(file, UploadFile):
        raise BadRequest("file must be a file part, with a file name.", code="invalid_type", param="file")
    if purpose not in UPLOADABLE:
        text = f"purpose must be one of {', '.join(UPLOADABLE)} (got {purpose!r})."
        raise InvalidValue(text, code="invalid_value", param="purpose")
    return Upload(file.file, _filename(file.filename), str(purpose), _lifetime(form))


def _filename(given: str | None) -> str:
    name = PureWindowsPath(given or "").name  # because it splits at both separators
    if not 1 <= len(name) <= 255 or "\x00" in name:
        text = f"file: its name must have 1 to 255 characters (got {len(name)})."
        raise InvalidValue(text, code="invalid_value", param="file")
    return name


def _lifetime(form: FormData) -> int | None:
    anchor, seconds = form.get("expires_after[anchor]"), form.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        text = f"expires_after[anchor] must be 'created_at' (got {anchor!r})."
        raise InvalidValue(text, code="invalid_value", param="expires_after[anchor]")
    text = str(seconds)
    if not (text.isascii() and text.isdecimal() and LIFETIME[0] <= int(text[:12]) <= LIFETIME[1]):
        text = f"expires_after[seconds] must be an integer from {LIFETIME[0]} to {LIFETIME[1]} (got {seconds!r})."
        raise InvalidValue(text, code="invalid_value", param="expires_after[seconds]")
    return int(text)


UploadDep = Annotated[Upload, Depends(_upload)]


async def _stored(upload: UploadDep, attempt: IdentityDep, storage: StorageDep) -> Stored:
    """Store the bytes before the route opens a session, so that no transaction is open during the upload."""
    project, limit = attempt.caller.project_id, get_settings().max_upload_bytes
    return await run_in_storage_thread(files.store, storage, upload.stream, project_id=project, limit=limit)


StoredDep = Annotated[Stored, Depends(_stored)]
