"""Checks the rows of uploaded files: one file after another of a size, the projects in turn.

Files of like size wait in one lane, so that a small one never waits for a large one, and a lane checks one file at a
time. The next is that of the project whose last turn is the longest ago: who uploads a thousand files delays others
by one. The rows are read by `worker.maintenance.row_reader` in a process of their own; what is left here is to pass
bytes on, so nobody's file takes time or memory from the process that recovers jobs.
"""

import threading
from collections.abc import Iterable
from functools import partial

from api.core.db.database import session_scope
from api.core.files import validation
from api.core.files.storage import get_storage
from api.core.files.validation import Claim
from api.core.logs import get_logger
from worker.maintenance import row_reader

MIB = 1 << 20
# A check that was begun so often and never ended is not tried again.
MAX_CHECKS = 5
# A check that is not renewed for so long is anybody's; a file that could not be read is left alone for so long.
LEASE_SECONDS, PAUSE_SECONDS = 30.0, 10.0
REMEMBERED = 10_000  # projects whose last turn is known

log = get_logger(__name__)


class RoundRobin:
    """Which of the waiting projects is next."""

    def __init__(self) -> None:
        self._served: dict[str, None] = {}  # in the order of their last turns

    def next(self, waiting: Iterable[str]) -> str | None:
        """One that had no turn yet, else the one whose last turn is the longest ago; None if nobody waits."""
        wanted = dict.fromkeys(waiting)
        chosen = next((project for project in wanted if project not in self._served), None)
        chosen = chosen or next((project for project in self._served if project in wanted), None)
        if chosen is not None:
            self._served.pop(chosen, None)
            self._served[chosen] = None
        if len(self._served) > REMEMBERED:
            del self._served[next(iter(self._served))]
        return chosen


class Lane:
    """A chore of the reconciler: checks the next file of more than `above` and at most `up_to` bytes."""

    def __init__(self, name: str, *, above: int, up_to: int | None) -> None:
        self.__name__ = f"check_{name}_files"
        self.leaving = threading.Event()
        self._above, self._up_to = above, up_to
        self._projects = RoundRobin()

    def __call__(self) -> bool:
        """Check one file; False when there is none, or none that can be read now."""
        claim = self._claim()
        return claim is not None and self._check(claim)

    def _claim(self) -> Claim | None:
        with session_scope(read_only=True) as session:
            waiting = validation.find_waiting_projects(session, above=self._above, up_to=self._up_to)
        project = self._projects.next(waiting)
        if project is None:
            return None
        with session_scope() as session:
            claim = validation.claim(session, project, above=self._above, up_to=self._up_to, seconds=LEASE_SECONDS)
            session.commit()
        return claim

    def _check(self, claim: Claim) -> bool:
        if claim.checks > MAX_CHECKS:
            return _record(claim, _never_ended("whoever began it fell"))
        chunks = get_storage().read(claim.storage_key)
        seconds = seconds_for(claim.bytes)
        try:
            verdict = row_reader.read(chunks, seconds=seconds, leaving=self.leaving, wanted=partial(_renew, claim))
        except FileNotFoundError:
            return _record(claim, validation.unusable_verdict("the file's bytes are gone"))
        except row_reader.Unwanted:  # deleted, or taken over by another reconciler
            log.info("gave up checking a file", file_id=claim.file_id)
            return True
        except row_reader.Leaving:
            return _give_back(claim, seconds=0.0, counts=False)
        except row_reader.Unreadable as error:
            log.warning("a file cannot be read now", file_id=claim.file_id, error=str(error))
            return _give_back(claim, seconds=PAUSE_SECONDS, counts=False)
        except row_reader.Interrupted as error:
            log.warning("a check of a file was interrupted", file_id=claim.file_id, error=str(error))
            if claim.checks == MAX_CHECKS:
                return _record(claim, _never_ended(str(error)))
            return _give_back(claim, seconds=PAUSE_SECONDS, counts=True)
        return _record(claim, verdict)


def seconds_for(size: int) -> int:
    """Seconds of a processor for a file of `size` bytes: several times what the shortest rows that are right need."""
    return 10 + 2 * (size // MIB)


def _renew(claim: Claim) -> bool:
    with session_scope() as session:
        ours = validation.renew(session, claim, seconds=LEASE_SECONDS)
        session.commit()
    return ours


def _record(claim: Claim, verdict: dict[str, object]) -> bool:
    with session_scope() as session:
        written = validation.record_verdict(session, claim, verdict)
        session.commit()
    log.info("checked a file", file_id=claim.file_id, status=verdict["status"], written=written)
    return True


def _give_back(claim: Claim, *, seconds: float, counts: bool) -> bool:
    with session_scope() as session:
        validation.release(session, claim, seconds=seconds, counts=counts)
        session.commit()
    return False


def _never_ended(why: str) -> dict[str, object]:
    return validation.unusable_verdict(
        f"checking its rows was begun {MAX_CHECKS} times and never came to an end ({why})"
    )


LANES = (
    Lane("small", above=-1, up_to=8 * MIB),
    Lane("medium", above=8 * MIB, up_to=64 * MIB),
    Lane("large", above=64 * MIB, up_to=None),
)
