"""Checks the rows of uploaded files, the projects in turn.

Files of similar size share a lane, so that a small file never waits for a large one. A lane checks one file at a time.
The next file is of the project that was served the longest ago, so a project with a thousand files delays others by one
file only. `worker.maintenance.row_reader` reads the rows in another process, because a bad file must not take time or
memory from the process that recovers jobs.
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
# A check that was begun so often without a result is not tried again, because the file may crash its reader.
MAX_CHECKS = 5
# A check that is not renewed for the first time may be taken over. A file that could not be read waits for the second.
LEASE_SECONDS, PAUSE_SECONDS = 30.0, 10.0
REMEMBERED = 10_000  # projects, so that the memory is bounded

log = get_logger(__name__)


class RoundRobin:
    """Decides which of the waiting projects is next."""

    def __init__(self) -> None:
        self._served: dict[str, None] = {}  # the project that was served the longest ago comes first

    def next(self, waiting: Iterable[str]) -> str | None:
        """A project that was not served yet, or the one that was served the longest ago; None if none waits."""
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
        """Check one file; False if there is none, or if it cannot be read now."""
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
            return _record(claim, _never_ended("the processes that began it crashed"))
        chunks = get_storage().read(claim.storage_key)
        seconds = compute_time_limit(claim.bytes)
        try:
            result = row_reader.read(chunks, seconds=seconds, leaving=self.leaving, wanted=partial(_renew, claim))
        except FileNotFoundError:
            return _record(claim, validation.unusable_result("the file's bytes are gone"))
        except row_reader.Unwanted:  # deleted, or taken over by another reconciler
            log.info("stopped checking a file", file_id=claim.file_id)
            return True
        except row_reader.Leaving:
            return _release(claim, seconds=0.0, counts=False)
        except row_reader.Unreadable as error:
            log.warning("a file cannot be read now", file_id=claim.file_id, error=str(error))
            return _release(claim, seconds=PAUSE_SECONDS, counts=False)
        except row_reader.Interrupted as error:
            log.warning("a check of a file was interrupted", file_id=claim.file_id, error=str(error))
            if claim.checks == MAX_CHECKS:
                return _record(claim, _never_ended(str(error)))
            return _release(claim, seconds=PAUSE_SECONDS, counts=True)
        return _record(claim, result)


def compute_time_limit(size: int) -> int:
    """Processor seconds for a file of `size` bytes: several times what correct rows need, even very short ones."""
    return 10 + 2 * (size // MIB)


def _renew(claim: Claim) -> bool:
    with session_scope() as session:
        ours = validation.renew(session, claim, seconds=LEASE_SECONDS)
        session.commit()
    return ours


def _record(claim: Claim, result: dict[str, object]) -> bool:
    with session_scope() as session:
        written = validation.record_result(session, claim, result)
        session.commit()
    log.info("checked a file", file_id=claim.file_id, status=result["status"], written=written)
    return True


def _release(claim: Claim, *, seconds: float, counts: bool) -> bool:
    with session_scope() as session:
        validation.release(session, claim, seconds=seconds, counts=counts)
        session.commit()
    return False


def _never_ended(why: str) -> dict[str, object]:
    return validation.unusable_result(
        f"checking its rows was begun {MAX_CHECKS} times and never came to an end ({why})"
    )


LANES = (
    Lane("small", above=-1, up_to=8 * MIB),
    Lane("medium", above=8 * MIB, up_to=64 * MIB),
    Lane("large", above=64 * MIB, up_to=None),
)
