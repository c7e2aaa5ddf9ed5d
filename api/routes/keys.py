"""API keys of the caller's project, for its admins. A secret is in one answer and is never stored.

This is the only create that is not idempotent (`api.core.access.idempotency`), because repeating its answer would
require storing the secret. A retry makes a second key, and nobody has the secret of the first.
"""

from datetime import timedelta

from fastapi import APIRouter

from api.core.access import keys
from api.core.db.database import now
from api.dependencies import AdminDep, Reading, Writing
from api.http.bodies import BoundedBody
from api.routes.query import After, Limit100
from api.schemas.key import KeyObject, KeyRequest, NewKeyObject, make_key_object, make_new_key_object
from api.schemas.wire import V1_RESPONSES, Deleted, Page, make_page

router = APIRouter(
    prefix="/v1/organization/projects/{project_id}",
    tags=["API keys"],
    route_class=BoundedBody,
    responses=V1_RESPONSES,
)


@router.post("/api_keys")
def create(project_id: str, body: KeyRequest, caller: AdminDep, session: Writing) -> NewKeyObject:
    """Make a key (extension). `value` is its secret, shown only now."""
    project = keys.find_project(session, caller, project_id)
    life = body.expires_in_seconds
    expires_at = None if life is None else now(session) + timedelta(seconds=life)
    key, secret = keys.create_key(session, project, name=body.name, role=body.role, expires_at=expires_at)
    session.commit()
    return make_new_key_object(key, secret)


@router.get("/api_keys")
def list_keys(
    project_id: str, caller: AdminDep, session: Reading, after: After = None, limit: Limit100 = None
) -> Page[KeyObject]:
    """Keys of the project, newest first."""
    project = keys.find_project(session, caller, project_id)
    rows, more = keys.list_page(session, project.id, after=after, limit=limit or 20)
    return make_page([make_key_object(row) for row in rows], has_more=more)


@router.get("/api_keys/{key_id}")
def retrieve(project_id: str, key_id: str, caller: AdminDep, session: Reading) -> KeyObject:
    """One key."""
    project = keys.find_project(session, caller, project_id)
    return make_key_object(keys.find_key(session, project.id, key_id))


@router.delete("/api_keys/{key_id}")
def delete(project_id: str, key_id: str, caller: AdminDep, session: Writing) -> Deleted:
    """Delete a key. Requests with it are refused from now on."""
    project = keys.find_project(session, caller, project_id)
    keys.delete_key(session, keys.find_key(session, project.id, key_id).id)
    session.commit()
    return Deleted(id=key_id, object="organization.project.api_key.deleted")
