"""Claims of checks of uploaded files: which file is next, which process checks it, and the result.

The rows themselves are read by `worker.maintenance.row_checks`.

A check is claimed like a job: by a compare-and-set that counts the claims and sets the time until which no other
process may begin one. Only the last claim writes the result, so that two reconcilers, or one that was frozen, do no
harm. A claim that was taken over, or whose file was deleted, writes nothing.
Nothing here commits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, func, or_, select, update
from sqlalchemy.orm import Session

from api.core.db.database import now
from api.core.db.tables import File, is_unchecked


@dataclass(frozen=True)
class Claim:
    """A check that was begun: its file, and in `checks` its number."""

    file_id: str
    storage_key: str
    bytes: int
    checks: int


def find_waiting_projects(session: Session, *, above: int, up_to: int | None) -> list[str]:
    """Projects with an unchecked file of this size in bytes (above < size <= up_to), the longest waiting first.

    Files are checked by size, so that a small one never waits for a large one.
    """
    oldest = func.min(File.created_at)
    rows = select(File.project_id).where(*_waiting(now(session), above, up_to)).group_by(File.project_id)
    return list(session.scalars(rows.order_by(oldest, File.project_id)))


def claim(session: Session, project_id: str, *, above: int, up_to: int | None, seconds: float) -> Claim | None:
    """Begin to check a project's oldest unchecked file of this size; None if another process was faster."""
    at = now(session)
    wanted = select(File).where(File.project_id == project_id, *_waiting(at, above, up_to))
    file = session.scalar(wanted.order_by(File.created_at, File.id).limit(1))
    if file is None:
        return None
    begun = Claim(file.id, file.storage_key, file.bytes, file.checks + 1)
    values = {"checks": begun.checks, "check_until": at + timedelta(seconds=seconds)}
    return begun if _set(session, begun, values, File.checks == file.checks) else None


def renew(session: Session, claim: Claim, *, seconds: float) -> bool:
    """Extend the claim by so many seconds; False if another check has taken over or the file was deleted."""
    return _set(session, claim, {"check_until": now(session) + timedelta(seconds=seconds)}, _ours(claim))


def release(session: Session, claim: Claim, *, seconds: float, counts: bool) -> None:
    """Release the file, to be checked again in `seconds` at the earliest.

    `counts`: this was an attempt. Attempts are counted, because a file that ends every process that reads it would
    otherwise be tried for ever.
    """
    until = now(session) + timedelta(seconds=seconds)
    _set(session, claim, {"check_until": until, "checks": claim.checks - (not counts)}, _ours(claim))


def record_result(session: Session, claim: Claim, columns: Mapping[str, object]) -> bool:
    """Write the result, unless another process has taken over or the file was deleted."""
    return _set(session, claim, columns, _ours(claim))


def unusable_result(why: str) -> dict[str, object]:
    """The result of a file whose rows could not be checked."""
    return {"status": "error", "status_details": why, "validation": None}


def unclaimed_conditions(at: datetime | ColumnElement[datetime]) -> list[ColumnElement[bool]]:
    """True of files that wait for a check at that time, of whatever size."""
    unclaimed = or_(File.check_until.is_(None), File.check_until <= at)
    return [is_unchecked(), File.deleted_at.is_(None), unclaimed]


def _waiting(at: datetime, above: int, up_to: int | None) -> list[ColumnElement[bool]]:
    small_enough = [] if up_to is None else [File.bytes <= up_to]
    return [*unclaimed_conditions(at), File.bytes > above, *small_enough]


def _ours(claim: Claim) -> ColumnElement[bool]:
    return File.checks == claim.checks


def _set(session: Session, claim: Claim, values: Mapping[str, Any], expected: ColumnElement[bool]) -> bool:
    """The compare-and-set of this module; False if another process was faster."""
    still = (File.id == claim.file_id, File.status == "uploaded", File.deleted_at.is_(None), expected)
    changed = update(File).where(*still).values(**values).execution_options(synchronize_session=False)
    return session.execute(changed).rowcount == 1  # type: ignore[attr-defined,no-any-return]
