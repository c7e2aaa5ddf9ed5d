"""Idempotent creates: a create request that is sent again returns what the first one made.

The official clients repeat a create whose answer was lost, without any key. So every create is
remembered by a fingerprint, in the same transaction as its object, and creates with the same
identity wait for each other in the database (SQLite has one writer anyway).
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import delete, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from api.core.access.keys import Caller
from api.core.db.database import now
from api.core.db.tables import Creation
from api.core.errors import InProgress, InvalidValue
from api.core.ids import new_id

KEY_LIFE = timedelta(hours=24)
WAIT_SECONDS = 5  # no longer, because a 409 then has the client retry, and a thread is free again


@dataclass(frozen=True, kw_only=True)
class RequestIdentity:
    """What identifies a create request: the caller, the path, the Idempotency-Key, and how often it was retried."""

    caller: Caller
    path: str
    key: str | None
    retry_count: int
    window: timedelta

    @property
    def is_retry(self) -> bool:
        """Whether the client has sent this request before."""
        return self.retry_count >= 1


@dataclass(frozen=True)
class IdempotentResult:
    """The answer to a create, and whether it repeats an earlier answer."""

    object_id: str
    body: dict[str, Any]
    replayed: bool


def compute_fingerprint(path: str, content: dict[str, Any]) -> str:
    """SHA-256 over the path and the canonical form of what was sent."""
    canonical = json.dumps([path, content], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def run_idempotent(
    session: Session,
    attempt: RequestIdentity,
    content: dict[str, Any],
    *,
    make: Callable[[], tuple[str, dict[str, Any]]],
    again: Callable[[str], dict[str, Any] | None],
) -> IdempotentResult:
    """Run `make`, or answer with what the same request made earlier.

    Args:
        content: the request as JSON; two requests with equal content are the same request.
        make: creates the object; its id and the answer.
        again: the answer for an existing object as it is now, None when it is gone.

    Raises:
        InvalidValue: the key was used for another request.
        InProgress: the first request with this identity has not ended after a few seconds.
    """
    mark = compute_fingerprint(attempt.path, content)
    _lock_identity(session, attempt, mark)
    earlier = _find_by_key(session, attempt, mark) if attempt.key else _find_by_fingerprint(session, attempt, mark)
    if earlier is not None:
        # With a key the first answer is repeated; without one, clients expect the object as it is now.
        current = None if attempt.key else again(earlier.object_id)
        return IdempotentResult(earlier.object_id, current or earlier.response, replayed=True)
    object_id, body = make()
    session.add(
        Creation(
            id=new_id("creation_"),
            project_id=attempt.caller.project_id,
            api_key_id=attempt.caller.key_id,
            path=attempt.path,
            idempotency_key=attempt.key,
            fingerprint=mark,
            object_id=object_id,
            response=body,
            created_at=now(session),
        )
    )
    session.flush()
    return IdempotentResult(object_id, body, replayed=False)


def delete_expired(session: Session) -> None:
    """Delete the records of creates that are too old to be repeated."""
    session.execute(delete(Creation).where(Creation.created_at < now(session) - KEY_LIFE))


def _lock_identity(session: Session, attempt: RequestIdentity, mark: str) -> None:
    """Wait for other requests with the same identity, so that only one creates. The lock ends with the commit."""
    if session.get_bind().dialect.name != "postgresql":
        return
    identity = f"{attempt.caller.project_id} {attempt.path} {attempt.key}" if attempt.key else mark
    number = int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], signed=True)
    try:
        session.execute(text(f"SET LOCAL lock_timeout = '{WAIT_SECONDS}s'"))
        session.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": number})
    except OperationalError as error:
        if getattr(error.orig, "sqlstate", None) != "55P03":  # lock_not_available: the wait above is over
            raise
        raise InProgress(
            "The first request with this Idempotency-Key has not ended yet.", code="idempotency_in_progress"
        ) from error


def _find_by_key(session: Session, attempt: RequestIdentity, mark: str) -> Creation | None:
    mine = (
        Creation.project_id == attempt.caller.project_id,
        Creation.path == attempt.path,
        Creation.idempotency_key == attempt.key,
    )
    # Deleted here, too, because the constraint would refuse to use an expired key again.
    session.execute(delete(Creation).where(*mine, Creation.created_at < now(session) - KEY_LIFE))
    earlier = session.scalar(select(Creation).where(*mine))
    if earlier is not None and earlier.fingerprint != mark:
        raise InvalidValue(
            f"Idempotency-Key {attempt.key!r} was already used for a request with another body.",
            code="idempotency_key_reused",
        )
    return earlier


def _find_by_fingerprint(session: Session, attempt: RequestIdentity, mark: str) -> Creation | None:
    if not attempt.is_retry:
        return None
    return session.scalar(
        select(Creation)
        .where(
            Creation.api_key_id == attempt.caller.key_id,
            Creation.fingerprint == mark,
            Creation.created_at > now(session) - attempt.window,
        )
        .order_by(Creation.created_at.desc())
        .limit(1)
    )
