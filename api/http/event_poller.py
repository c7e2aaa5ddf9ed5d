"""One query a second for all event streams of a process: their keys, their jobs, and the events not sent yet.

A stream that has sent all its events waits here for more. So a client that reads slowly delays no other and costs one
page of memory, and streams at the same event share the reading and the encoding of what follows.
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
from api.schemas.event import EventObject, make_event_object

BEAT_SECONDS = 1.0  # between two queries
SHARE_SECONDS = 0.05  # the least time between two queries, so that streams that arrive meanwhile share the second
TOGETHER = 64  # streams that are served by one query, so that a job with many events delays only these
PAGE = 200  # events that a stream is given at once, so that a long history does not fill the memory
DATABASE_AWAY = (OperationalError, InterfaceError, InternalError, PoolTimeout)
_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


@dataclass(frozen=True, slots=True)
class StreamPosition:
    """The number of the last event that a stream has sent, and the key with which it was opened."""

    job_id: str
    after: int
    key_id: str


@dataclass(frozen=True, slots=True)
class NewEvents:
    """Events that a stream has not sent yet, up to number `last`; `ended`: no more will follow."""

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
    """Queries the database while streams wait. The rest runs in the event loop's thread, so it needs no lock."""

    def __init__(self) -> None:
        self._waiting: dict[Waiting, StreamPosition] = {}
        self._hurry = asyncio.Event()
        self._task: asyncio.Task[None] | None = None  # runs as long as a stream waits
        self._ended = False

    async def wait_for_events(self, position: StreamPosition, *, at_once: bool) -> NewEvents | None:
        """Wait until there is more to send. The database is asked once a second, with `at_once` also immediately.

        Returns:
            None if the key is deleted or has expired, and when the server stops.
        """
        if self._ended:
            return None
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
        """Wake all streams that wait, so that they end. Those that come later do not wait."""
        self._ended = True
        for more in self._waiting:
            _set_result(more, None)

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
    """Give these streams their new events. Streams without new events go on waiting."""
    positions = {position for _, position in waiting}
    try:
        found = await run_in_threadpool(poll, positions)
    except Exception as error:  # given to each stream, because the task must go on for later ones
        found = dict.fromkeys(positions, error)
    for more, position in waiting:
        if position in found:
            _set_result(more, found[position])


def _set_result(more: Waiting, found: Found) -> None:
    if more.done():  # it has its result, or its client has disconnected
        return
    if isinstance(found, Exception):
        more.set_exception(found)
    else:
        more.set_result(found)


def poll(positions: Collection[StreamPosition]) -> dict[StreamPosition, Found]:
    """The new events at these positions. Positions without any are left out.

    While the database does not answer there are none, so that the streams stay open.
    """
    try:
        with session_scope(read_only=True) as session:
            return find_news(session, positions)
    except DATABASE_AWAY:
        return {}


def find_news(session: Session, positions: Collection[StreamPosition]) -> dict[StreamPosition, Found]:
    """As `poll`, with a session."""
    usable = keys.find_usable(session, {one.key_id for one in positions})
    # Jobs are read before events, so that the last event of an ended job is among the events.
    jobs = _jobs(session, {one.job_id for one in positions})
    wanted = {(one.job_id, one.after) for one in positions if one.key_id in usable}
    pages = {(job_id, after): _page(session, job_id, after, jobs.get(job_id)) for job_id, after in wanted}
    found: dict[StreamPosition, Found] = {}
    for one in positions:
        if one.key_id not in usable:
            found[one] = None
        elif (page := pages[one.job_id, one.after]) is not None:
            found[one] = page
    return found


def _jobs(session: Session, ids: Collection[str]) -> dict[str, tuple[str, int]]:
    """Status and number of events of those jobs that exist."""
    rows = session.execute(select(Job.id, Job.status, Job.event_count).where(Job.id.in_(ids)))
    return {row.id: (row.status, row.event_count) for row in rows}


def _page(session: Session, job_id: str, after: int, job: tuple[str, int] | None) -> NewEvents | Exception | None:
    """The events after number `after`, or the error of reading them; None if there are none and the job goes on."""
    status, count = job or (None, after)
    try:
        rows = events.list_since(session, job_id, after, limit=PAGE) if count > after else []
        text = "".join(_block(make_event_object(row)) for row in rows)
    except DATABASE_AWAY:
        raise
    except Exception as error:  # so that it ends the streams of this job and no others
        return error
    ended = len(rows) < PAGE and (status is None or status in FINAL_STATUSES)
    return NewEvents(text, rows[-1].sequence if rows else after, len(rows), ended) if rows or ended else None


def _block(event: EventObject) -> str:
    # In ASCII, because some clients take characters like U+2028 for the end of a line.
    data = _encode(event.model_dump(mode="json"))
    return f"id: {event.id}\nevent: {event.type}\ndata: {data}\n\n"
