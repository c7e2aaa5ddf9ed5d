"""Files: upload, list, retrieve, delete, download."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, BackgroundTasks, Query, Request
from fastapi.responses import Response

from api.core.access.idempotency import run_idempotent
from api.core.errors import NotFound
from api.core.files import files, quota
from api.dependencies import CallerDep, IdentityDep, Reading, StorageDep, Writing
from api.routes.clear import clear
from api.routes.download import BYTES, download
from api.routes.query import After, Empty, Limit10000, Text
from api.routes.upload import SCHEMA, StoredDep, UploadDep
from api.schemas.file import FileObject, compute_fingerprint, make_file_object
from api.schemas.wire import IDEMPOTENT_RESPONSES, V1_RESPONSES, Deleted, Page, make_page

router = APIRouter(prefix="/v1", tags=["files"], responses=V1_RESPONSES)


@router.post("/files", openapi_extra=SCHEMA, response_model=FileObject, responses=IDEMPOTENT_RESPONSES)
def create(
    upload: UploadDep,
    attempt: IdentityDep,
    stored: StoredDep,
    session: Writing,
    storage: StorageDep,
    background: BackgroundTasks,
    reply: Response,
) -> Any:
    """Store a file.

    Its rows are checked afterwards, because an upload that waited for gigabytes of rows would time out: `status` is
    `uploaded` until then.
    """
    project, about = attempt.caller.project_id, {"purpose": upload.purpose, "filename": upload.filename}

    def make() -> tuple[str, dict[str, Any]]:
        quota.reserve_quota(session, project, adding=stored.bytes)
        file = files.add(session, stored, project_id=project, lifetime=upload.lifetime, **about)
        return file.id, make_file_object(file).model_dump()

    def again(file_id: str) -> dict[str, Any] | None:
        try:
            return make_file_object(files.find(session, project, file_id)).model_dump()
        except NotFound:
            return None

    with files.remove_on_error(session, storage, stored):
        content = compute_fingerprint(stored, lifetime=upload.lifetime, **about)
        outcome = run_idempotent(session, attempt, content, make=make, again=again)
        session.commit()
    if outcome.replayed:  # the first request has stored the file, so these bytes belong to no row
        background.add_task(clear, storage, stored.storage_key)
        reply.headers["idempotency-replayed"] = "true"
    return outcome.body


@router.get("/files")
def list_files(
    caller: CallerDep,
    session: Reading,
    after: After = None,
    limit: Limit10000 = None,
    purpose: Annotated[Text | None, Empty, Query()] = None,
    order: Annotated[Literal["asc", "desc"] | None, Empty, Query()] = None,
) -> Page[FileObject]:
    """Files of the project, newest first."""
    rows, more = files.list_page(
        session, caller.project_id, after=after, limit=limit or 10_000, purpose=purpose, order=order or "desc"
    )
    return make_page([make_file_object(row) for row in rows], has_more=more)


@router.get("/files/{file_id}")
def retrieve(file_id: str, caller: CallerDep, session: Reading) -> FileObject:
    """One file."""
    return make_file_object(files.find(session, caller.project_id, file_id))


@router.delete("/files/{file_id}")
def delete(
    file_id: str, attempt: IdentityDep, session: Writing, storage: StorageDep, background: BackgroundTasks
) -> Deleted:
    """Delete a file that no open job and no model needs."""
    key = files.delete(session, attempt, file_id)
    session.commit()  # before the bytes are deleted, because these cannot be brought back if the commit fails
    if key is not None:
        background.add_task(clear, storage, key)
    return Deleted(id=file_id, object="file")


@router.head("/files/{file_id}/content", include_in_schema=False)
@router.get("/files/{file_id}/content", response_class=Response, responses=BYTES)
def content(file_id: str, request: Request, caller: CallerDep, session: Reading, storage: StorageDep) -> Response:
    """Exactly the uploaded bytes; ranges and conditions are supported."""
    file = files.find_readable(session, caller.project_id, file_id)
    kind = "text/csv; charset=utf-8" if file.filename.endswith(".csv") else "application/octet-stream"
    if file.purpose != "fine-tune-results":
        kind = "application/octet-stream"
    return download(request, storage, file, media_type=kind, name=file.filename)
