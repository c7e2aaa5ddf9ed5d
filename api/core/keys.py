"""Projects and API keys: 32 random bytes behind a prefix, stored as SHA-256, shown once."""

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from api.core.db import now
from api.core.ids import new_id
from api.core.models import ApiKey, Project

PREFIX = "sk-lorainit-"


@dataclass(frozen=True)
class Caller:
    """Who is asking: one key of one project."""

    key_id: str
    project_id: str


def get_or_create_project(session: Session, name: str) -> Project:
    """The project called `name`."""
    project = session.scalar(select(Project).where(Project.name == name))
    if project is None:
        project = Project(id=new_id("proj_", 16), name=name, created_at=now(session))
        session.add(project)
        session.flush()
    return project


def create_key(
    session: Session, project: Project, *, name: str, expires_at: datetime | None = None
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
        created_at=now(session),
        expires_at=expires_at,
        deleted_at=None,
    )
    session.add(key)
    session.flush()
    return key, secret


def authenticate(session: Session, secret: str) -> Caller | None:
    """The caller behind `secret`; None when it is unknown, deleted or expired.

    The row is found by the id inside the key; the digests are compared in constant time.
    """
    key_id, _, rest = secret.removeprefix(PREFIX).partition("-")
    if not secret.startswith(PREFIX) or not rest:
        return None
    key = session.get(ApiKey, f"key_{key_id}")
    if key is None or not hmac.compare_digest(key.secret_sha256, _digest(secret)):
        return None
    if key.deleted_at is not None or (key.expires_at is not None and key.expires_at <= now(session)):
        return None
    return Caller(key_id=key.id, project_id=key.project_id)


def delete_key(session: Session, key_id: str) -> bool:
    """Make a key useless at once; False when there is no such key."""
    key = session.get(ApiKey, key_id)
    if key is None or key.deleted_at is not None:
        return False
    key.deleted_at = now(session)
    return True


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
