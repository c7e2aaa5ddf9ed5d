"""One look a second for all streams of a process: their keys, their jobs, and what each has not sent yet.

A stream that has sent all it was given waits here for more. So a client that reads slowly holds up nobody and costs
one page of memory, and streams that stand at the same event share its reading and its encoding.
"""

import asyncio
import json
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from api.core.access import keys
from api.core.db.database import session_scope
from api.core.db.tables import FINAL_STATUSES, Job
from api.core.jobs import events
from api.schemas.event import EventObject, event_object

BEAT_SECONDS = 1.0
SHARE_SECONDS = 0.05  # at least, between two looks: those who come meanwhile share the second one
TOGETHER = 64  # streams that are served before the next ones, so that jobs with many events delay only these
PAGE = 200
DATABASE_AWAY = (OperationalError, InterfaceError, InternalError, PoolTimeout)
_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


@dataclass(frozen=True, slots=True)
class StreamPosition:
    """Where a stream stands: the number of the last event that it has sent, and the key that it was opened with."""

    job_id: str
    after: int
    key_id: str


@dataclass(frozen=True, slots=True)
class NewEvents:
    """What a stream has not sent yet, up to event number `last`; `ended`: nothing will follow."""

    text: str
    last: int
    count: int
    ended: bool

    @property
    def is_full(self) -> bool:
        """Whether there may be more already."""
        return self.count == PAGE


# None: the key is deleted or has expired.
Found = NewEvents | Exception | None
Waiting = asyncio.Future[NewEvents | None]


class EventPoller:
    """Looks while streams wait. All but the looking itself is done in the event loop's own thread."""

    def __init__(self) -> None:
        self._waiting: dict[Waiting, StreamPosition] = {}
        self._hurry = asyncio.Event()
        self._task: asyncio.Task[None] | None = None  # looks as long as somebody waits

    async def wait_for_events(self, position: StreamPosition, *, at_once: bool) -> NewEvents | None:
        """Wait until there is more to send, which is looked for once a second, or at once and then once a second.

        Returns:
            None for a key that is deleted or has expired, and when the ticker ends.
        """
        loop = asyncio.get_running_loop()
        more: Waiting = loop.create_future()
        self._waiting[more] = position
        if self._task is None or self._task.done():
            self._hurry, self._task = asyncio.Event(), loop.create_task(self._tick())
        elif at_once:
            self._hurry.set()
        try:
            return await more
        finally:
            del self._waiting[more]

    def end(self) -> None:
        """Let all go who wait."""
        for more in self._waiting:
            _tell(more, None)

    async def _tick(self) -> None:
        while self._waiting:
            self._hurry.clear()
            waiting = list(self._waiting.items())
            for start in range(0, len(waiting), TOGETHER):
                await _serve(waiting[start : start + TOGETHER])
            await asyncio.sleep(min(SHARE_SECONDS, BEAT_SECONDS))
            with suppress(TimeoutError):
                async with asyncio.timeout(BEAT_SECONDS - SHARE_SECONDS):
                    await self._hurry.wait()


async def _serve(waiting: Sequence[tuple[Waiting, StreamPosition]]) -> None:
    """Tell these streams what is new; those for which nothing is wait on."""
    positions = {position for _, position in waiting}
    try:
        found = await run_in_threadpool(poll, positions)
    except Exception as error:
        found = dict.fromkeys(positions, error)
    for more, position in waiting:
        if position in found:
            _tell(more, found[position])


def _tell(more: Waiting, found: Found) -> None:
    if more.done():  # it was told, or its client has gone
        return
    if isinstance(found, Exception):
        more.set_exception(found)
    else:
        more.set_result(found)


def poll(positions: Collection[StreamPosition]) -> dict[StreamPosition, Found]:
    """What is new at these positions; those where nothing is are left out.

    Nothing is new while the database is away, which a client need not notice.
    """
    try:
        with session_scope(read_only=True) as session:
            return find_news(session, positions)
    except DATABASE_AWAY:
        return {}


def find_news(session: Session, positions: Collection[StreamPosition]) -> dict[StreamPosition, Found]:
    """As `look`, while the database is there."""
    usable = keys.find_usable(session, {one.key_id for one in positions})
    # Before the events: what ended a job is among them.
    jobs = _jobs(session, {one.job_id for one in positions})
    places = {(one.job_id, one.after) for one in positions if one.key_id in usable}
    pages = {(job_id, after): _page(session, job_id, after, jobs.get(job_id)) for job_id, after in places}
    found: dict[StreamPosition, Found] = {}
    for one in positions:
        if one.key_id not in usable:
            found[one] = None
        elif (page := pages[one.job_id, one.after]) is not None:
            found[one] = page
    return found


def _jobs(session: Session, ids: Collection[str]) -> dict[str, tuple[str, int]]:
    """Status and number of events of those that are there."""
    rows = session.execute(select(Job.id, Job.status, Job.event_count).where(Job.id.in_(ids)))
    return {row.id: (row.status, row.event_count) for row in rows}


def _page(session: Session, job_id: str, after: int, job: tuple[str, int] | None) -> NewEvents | Exception | None:
    """The events after number `after`, or what is wrong with them; None if there is nothing to say."""
    status, count = job or (None, after)
    try:
        rows = events.list_since(session, job_id, after, limit=PAGE) if count > after else []
        text = "".join(_block(event_object(row)) for row in rows)
    except DATABASE_AWAY:
        raise
    except Exception as error:  # ends this job's streams and no others
        return error
    ended = len(rows) < PAGE and (status is None or status in FINAL_STATUSES)
    return NewEvents(text, rows[-1].sequence if rows else after, len(rows), ended) if rows or ended else None


def _block(event: EventObject) -> str:
    # ASCII: some clients take characters like U+2028 for the end of a line.
    data = _encode(event.model_dump(mode="json"))
    return f"id: {event.id}\nevent: {event.type}\ndata: {data}\n\n"
