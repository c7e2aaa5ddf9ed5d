"""Since when this database and its storage have belonged together without a break.

An object that no row names is an orphan only if this database would know it otherwise. A database that was restored
from a backup does not know what was stored after the backup. So a random mark is written to the storage once a minute
and remembered here. If the two differ, another database has used this storage meanwhile: the period ends where
this database last saw its own mark, and a new one begins now. Objects written between two periods are never removed.
The same is done after an hour without a check, because a restored backup may contain the old mark, too.

Functions take a session first and never commit. Nothing here reads or writes the storage.
"""

import secrets
from datetime import datetime, timedelta
from typing import NamedTuple

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from api.core.db.database import now
from api.core.db.tables import StoragePeriod
from api.core.ids import new_id

FOLDER = "watch"
# So long because a row is written some time after its bytes, clocks differ a little, and a restart takes a while.
SLACK = timedelta(hours=1)


class PeriodState(NamedTuple):
    """The newest period as it was read or written; the mark in the storage has to be one of the two tokens."""

    id: str
    token: str
    next_token: str
    until: datetime
    lasted: bool

    def knows(self, mark: str | None) -> bool:
        """The mark in the storage is one that this database wrote last, or was about to write."""
        return mark in (self.token, self.next_token)


def find_marker_key(session: Session) -> str | None:
    """Where the mark of this database and of all its copies lies; None before its first period."""
    first = session.scalar(select(StoragePeriod.id).order_by(StoragePeriod.since, StoragePeriod.id).limit(1))
    return None if first is None else f"{FOLDER}/{first}"


def find_newest(session: Session) -> PeriodState | None:
    """The period that has not ended, as of the last check."""
    row = _find_newest_row(session)
    return (
        None if row is None else PeriodState(row.id, row.token, row.next_token, row.until, lasted=row.until > row.since)
    )


def _find_newest_row(session: Session) -> StoragePeriod | None:
    return session.scalar(select(StoragePeriod).order_by(StoragePeriod.since.desc(), StoragePeriod.id.desc()).limit(1))


def begin_period(session: Session) -> PeriodState:
    """Begin a new period now. The last one is overwritten if it was too short to be of use."""
    at, token = now(session), secrets.token_hex(16)
    last = _find_newest_row(session)
    if last is None or last.until - last.since > SLACK:
        last = StoragePeriod(id=new_id("watch-"))
        session.add(last)
    last.since = last.until = at
    last.token = last.next_token = token
    session.flush()
    return PeriodState(last.id, token, token, at, lasted=False)


def extend_period(session: Session, seen: PeriodState, mark: str | None) -> PeriodState | None:
    """Extend the period that was read, with a new token that is to become the mark.

    A new period begins if the mark is not this database's, or if the last check was long ago. None: another process
    is checking right now.
    """
    if not seen.knows(mark) or now(session) - seen.until > SLACK:
        return begin_period(session)
    same = (StoragePeriod.id == seen.id, StoragePeriod.token == seen.token, StoragePeriod.next_token == seen.next_token)
    token = secrets.token_hex(16)
    changed = update(StoragePeriod).where(*same).values(next_token=token).returning(StoragePeriod.id)
    return None if session.scalar(changed) is None else seen._replace(next_token=token)


def confirm_period(session: Session, look: PeriodState) -> None:
    """The mark is written: the period has lasted until now."""
    same = (StoragePeriod.id == look.id, StoragePeriod.next_token == look.next_token)
    session.execute(update(StoragePeriod).where(*same).values(token=look.next_token, until=now(session)))


def list_periods(session: Session) -> list[tuple[datetime, datetime]]:
    """From when to when: objects written then would have a row here, unless they are orphans."""
    rows = session.execute(select(StoragePeriod.since, StoragePeriod.until).order_by(StoragePeriod.since))
    return [(since, until - SLACK) for since, until in rows]
