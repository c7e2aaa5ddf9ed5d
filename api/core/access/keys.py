"""Projects and API keys: 32 random bytes behind a prefix, stored as SHA-256, shown once.

A key belongs to one project. A `member` creates, reads and cancels jobs. An `admin` may also use high
priority, and lists, makes and deletes the project's keys.
"""

import hashlib
import hmac
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, NamedTuple

from sqlalchemy import bindparam, or_, select
from sqlalchemy.orm import Session

from api.core.db import database, paging
from api.core.db.database import now
from api.core.db.tables import ApiKey, Project
from api.core.errors import Forbidden, NotFound
from api.core.ids import new_id

PREFIX = "sk-lorainit-"
Role = Literal["admin", "member"]


@dataclass(frozen=True)
class Caller:
    """Who is asking: one key of one project."""

    key_id: str
    project_id: str
    role: str


class Key(NamedTuple):
    """The columns that decide whether a key is accepted."""

    id: str
    project_id: str
    role: str
    secret_sha256: str
    expires_at: datetime | None
    deleted_at: datetime | None


# The columns of a `Key`. They are labelled because a statement that joins jobs has columns of the same names.
KEY_COLUMNS = [ApiKey.__table__.c[name].label(f"key_{name}") for name in Key._fields]
_ONE_KEY = select(*KEY_COLUMNS).where(ApiKey.id == bindparam("key"))


def get_or_create_project(session: Session, name: str) -> Project:
    """The project called `name`."""
    project = session.scalar(select(Project).where(Project.name == name))
    if project is None:
        project = Project(id=new_id("proj_", 16), name=name, created_at=now(session))
        session.add(project)
        session.flush()
    return project


def create_key(
    session: Session, project: Project, *, name: str, role: Role = "member", expires_at: datetime | None = None
) -> tuple[ApiKey, str]:
    """A new key and its secret. The secret exists only in this answer."""
    key_id = secrets.token_hex(8)
    secret = f"{PREFIX}{key_id}-{secrets.token_urlsafe(32)}"
    key = ApiKey(
        id=f"key_{key_id}",
        project_id=project.id,
        name=name,
        secret_sha256=_digest(secret),
        hint=secret[-4:],
        role=role,
        created_at=now(session),
        expires_at=expires_at,
        deleted_at=None,
    )
    session.add(key)
    session.flush()
    return key, secret


def parse_key_id(secret: str) -> str | None:
    """The id of the key whose secret this is; None if it does not look like a secret.

    A secret has the id in it, so that the key is found by an index and only one digest is compared.
    """
    key_id, _, rest = secret.removeprefix(PREFIX).partition("-")
    return f"key_{key_id}" if secret.startswith(PREFIX) and rest else None


def find(key_id: str | None) -> Key | None:
    """The key of this id, deleted or not."""
    row = database.find_row(_ONE_KEY, {"key": key_id}) if key_id else None
    return None if row is None else Key._make(row)


def authenticate(key: Key, secret: str) -> Caller | None:
    """The caller, if `secret` belongs to this key and the key is neither deleted nor expired; otherwise None.

    Digests are compared in constant time, so that the duration says nothing about the secret. The database is asked
    for the time only if the key expires.
    """
    if not hmac.compare_digest(key.secret_sha256, _digest(secret)) or key.deleted_at is not None:
        return None
    if key.expires_at is not None and key.expires_at <= _now():
        return None
    return Caller(key_id=key.id, project_id=key.project_id, role=key.role)


def _now() -> datetime:
    with database.session_scope(read_only=True) as session:
        return now(session)


def find_usable(session: Session, key_ids: Collection[str]) -> set[str]:
    """The ids of those of these keys that exist and are neither deleted nor expired."""
    unexpired = or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > now(session))
    found = select(ApiKey.id).where(ApiKey.id.in_(key_ids), ApiKey.deleted_at.is_(None), unexpired)
    return set(session.scalars(found))


def require_admin(caller: Caller, what: str, *, param: str | None = None) -> None:
    """Refuse a member.

    Raises:
        Forbidden: `what` needs an admin key.
    """
    if caller.role != "admin":
        text = f"{what} needs an admin key of this project; this key is a {caller.role}."
        raise Forbidden(text, code="insufficient_permissions", param=param)


def find_project(session: Session, caller: Caller, project_id: str) -> Project:
    """The project in the path. Any but the caller's own is "not found", so that ids cannot be probed."""
    if project_id != caller.project_id:
        raise NotFound(f"No such project: {project_id}", code="project_not_found", param="project_id")
    return session.get_one(Project, project_id)


def find_key(session: Session, project_id: str, key_id: str) -> ApiKey:
    """A key of this project that has not been deleted.

    Another project's key is "not found", so that ids cannot be probed.
    """
    key = session.get(ApiKey, key_id)
    if key is None or key.project_id != project_id or key.deleted_at is not None:
        raise NotFound(f"No such API key: {key_id}", code="key_not_found", param="key_id")
    return key


def list_page(session: Session, project_id: str, *, after: str | None, limit: int) -> tuple[Sequence[ApiKey], bool]:
    """Keys of a project, newest first; True when there are more."""
    query = select(ApiKey).where(ApiKey.project_id == project_id, ApiKey.deleted_at.is_(None))
    return paging.read_page(session, query, ApiKey, project_id=project_id, after=after, limit=limit)


def list_all(session: Session) -> Sequence[tuple[ApiKey, Project]]:
    """Every key of every project that has not been deleted, oldest first. Only for the operator."""
    query = select(ApiKey, Project).join(Project, Project.id == ApiKey.project_id)
    rows = session.execute(query.where(ApiKey.deleted_at.is_(None)).order_by(ApiKey.created_at, ApiKey.id))
    return [(key, project) for key, project in rows]


def delete_key(session: Session, key_id: str) -> bool:
    """Make a key useless at once; False when there is no such key."""
    key = session.get(ApiKey, key_id)
    if key is None or key.deleted_at is not None:
        return False
    key.deleted_at = now(session)
    return True


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
