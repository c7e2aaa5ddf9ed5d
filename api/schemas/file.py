"""The File object and the fields of an upload."""

from typing import Any, Literal

from pydantic import Field

from api.core.db.tables import File
from api.core.files.files import Stored
from api.schemas.wire import Element, to_unix, to_unix_or_none


class FileObject(Element):
    """A file. `status` is `uploaded` while its rows are being checked."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"]
    status_details: str | None
    sha256: str | None = Field(description="Lower-case hex of the bytes.")
    validation: dict[str, Any] | None = Field(description="What the check of the rows found.")


def make_file_object(file: File) -> FileObject:
    """A row as the caller sees it."""
    return FileObject(
        id=file.id,
        bytes=file.bytes,
        created_at=to_unix(file.created_at),
        expires_at=to_unix_or_none(file.expires_at),
        filename=file.filename,
        purpose=file.purpose,
        status=file.status,
        status_details=file.status_details,
        sha256=file.sha256 or None,
        validation=file.validation,
    )


def compute_fingerprint(stored: Stored, *, filename: str, purpose: str, lifetime: int | None) -> dict[str, Any]:
    """What makes two uploads the same order; a multipart body itself has a new boundary each time."""
    return {"filename": filename, "purpose": purpose, "expires_after": lifetime, "sha256": stored.sha256}
