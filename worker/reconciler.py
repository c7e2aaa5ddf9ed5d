"""The reconciler: a loop on the database alone that repairs what a crash or a lost message left.

    python -m worker.reconciler

Take jobs back from workers that fell silent, check the rows of new files, admit jobs whose files
are checked, notify workers of queued jobs, write result files of cancelled jobs. Not Celery beat:
it needs the broker, whose lost messages this loop sends again.

One look every `LORAINIT_RECONCILE_SECONDS` finds out which of these there are any of, and wakes those chores. One
that got something done has the next look come at once: when a file is checked, its jobs are admitted and workers
notified without a pause in between. All chores look for themselves once a minute besides, or as often as they say.
"""

import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from typing import Protocol, TypeVar

from obstore.exceptions import BaseError as StoreError
from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError

from api.core.db.database import plain_connection, session_scope
from api.core.db.tables import Job
from api.core.files.storage import get_storage
from api.core.jobs import admission, jobs, metrics
from api.core.logs import configure, get_logger
from api.core.maintenance import pending, startup
from api.core.queue import notify, queue
from api.core.settings import get_settings
from worker.maintenance import janitor
from worker.maintenance.row_checks import LANES

Item = TypeVar("Item")

NOTIFY_AGAIN_AFTER = timedelta(seconds=15)

log = get_logger(__name__)


class Chore(Protocol):
    """Something to do over and over; true when it did something, so that there may be more."""

    __name__: str

    def __call__(self) -> object:
        """Do it once."""


def recover() -> bool:
    """Jobs whose lease ran out go back to the queue, or fail when that happened too often without progress.

    True if some went back.
    """
    with session_scope(read_only=True) as session:
        silent = jobs.find_expired_leases(session)
    return any(_for_each(silent, _recover))


def _recover(job_id: str) -> bool:
    with session_scope() as session:
        taken = jobs.recover_lost_runs(session, max_attempts=get_settings().max_attempts, among=[job_id])
        session.commit()
    if taken:
        log.warning("took a job back from a silent worker", job_id=job_id)
    return bool(taken)


def admit() -> bool:
    """Jobs whose files are checked become queued or failed, one transaction each; True if some did."""
    with session_scope(read_only=True) as session:
        ready = admission.waiting(session)
    return any(_for_each(ready, _consider))


def _consider(job_id: str) -> bool:
    with session_scope() as session:
        verdict = admission.consider(session, job_id)
        session.commit()
    log.info("considered", job_id=job_id, verdict=verdict)
    return verdict != "waiting"


def announce() -> bool:
    """Notify workers of jobs that were never announced, and of those whose message got lost; True if some were."""
    with session_scope(read_only=True) as session:
        waiting = [*notify.find_unannounced(session), *notify.find_lost(session, patience=NOTIFY_AGAIN_AFTER)]
    for notification in waiting:
        try:
            queue.notify_workers(*notification)
        except queue.BrokerUnavailable as error:
            log.warning("the broker does not answer; jobs stay queued", error=str(error), job_id=notification.job_id)
            return False
        with session_scope() as session:
            notify.mark_notified(session, notification.job_id)
            session.commit()
    return bool(waiting)


def write_result_files() -> bool:
    """Ended jobs that logged steps get their result file; True if some were looked at."""
    with session_scope(read_only=True) as session:
        ended = metrics.find_without_csv(session)
    return any(_for_each(ended, _write_result_file))


def _write_result_file(job: Job) -> bool:
    with session_scope(read_only=True) as session:
        file = metrics.store_csv(session, get_storage(), job)
    with session_scope() as session:
        metrics.attach_csv(session, job.id, file)
        session.commit()
    return True


def _for_each(items: Sequence[Item], do: Callable[[Item], bool]) -> list[bool]:
    """What `do` says of each. One with which it goes wrong holds up none behind it; its error is raised at the end.

    Without a database all wait for the next time.
    """
    said, wrong = list[bool](), list[Exception]()
    for item in items:
        try:
            said.append(do(item))
        except OperationalError:
            raise
        except Exception as error:
            wrong.append(error)
    if wrong:
        raise wrong[0]
    return said


CHORES: tuple[Chore, ...] = (recover, admit, announce, write_result_files, *LANES, janitor.clear, *janitor.PAUSES)
# Which of them there is something to do for, as far as a look can say.
WOKEN: Mapping[str, Sequence[Chore]] = {
    "lost": [recover],
    "validating": [admit],
    "queued": [announce],
    "unwritten": [write_result_files],
    "unchecked": LANES,
    "uncleared": [janitor.clear],
}
# However little a look finds, its chores are done so often: should it ever miss something, that costs a delay.
SWEEP_SECONDS = 60.0
LONGEST_PAUSE = 30.0


def run(stop: threading.Event) -> None:
    """Every chore over and over, each in its own thread, until `stop` is set.

    A broker that does not answer (seconds per message) or a file of gigabytes holds up nobody else: rows are read by
    processes of their own (`worker.maintenance.row_checks`).
    """
    look, wakes = threading.Event(), {chore: threading.Event() for chore in CHORES}
    threads = [
        threading.Thread(target=_wake_chores, args=(look, wakes, stop), name="watch"),
        threading.Thread(target=_end, args=(look, wakes, stop), name="end"),
    ]
    for chore, wake in wakes.items():
        threads += [threading.Thread(target=_repeat, args=(chore, wake, look, stop), name=chore.__name__)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _end(look: threading.Event, wakes: Mapping[Chore, threading.Event], stop: threading.Event) -> None:
    """Nobody sleeps on once `stop` is set."""
    stop.wait()
    for event in (look, *wakes.values()):
        event.set()


def _wake_chores(look: threading.Event, wakes: Mapping[Chore, threading.Event], stop: threading.Event) -> None:
    """Look, and wake the chores that there is something for; again when `look` is set, or after a pause."""
    pause = get_settings().reconcile_seconds
    with ExitStack() as held:
        connection: Connection | None = None  # kept from look to look
        while not stop.is_set():
            look.clear()
            try:
                connection = connection or held.enter_context(plain_connection())
                found = pending.find_pending(connection)
                pause = get_settings().reconcile_seconds
            except Exception as error:
                pause = _longer(pause)
                log.warning("the reconciler could not look for work", error=str(error))
                found = None
            for chore in _chores_for(found):
                if chore in wakes:
                    wakes[chore].set()
            look.wait(pause)


def _chores_for(found: pending.PendingWork | None) -> list[Chore]:
    names = [] if found is None else [name for name, some in found._asdict().items() if some]
    return [chore for name in names for chore in WOKEN[name]]


def _repeat(chore: Chore, wake: threading.Event, look: threading.Event, stop: threading.Event) -> None:
    pause = get_settings().reconcile_seconds
    while not stop.is_set():
        wake.clear()
        try:
            more = chore()
            pause = get_settings().reconcile_seconds
        except Exception as error:
            # Twice a second for as long as a disk is full would fill it further.
            pause = _longer(pause)
            # Nothing in our code is wrong where a database or a store is away, and a traceback would say no more.
            say = log.warning if isinstance(error, OperationalError | StoreError) else log.exception
            say("a chore of the reconciler failed; it will be tried again", chore=chore.__name__, error=str(error))
            stop.wait(pause)
            continue
        if more:
            look.set()
        else:
            wake.wait(janitor.PAUSES.get(chore, SWEEP_SECONDS))


def _longer(pause: float) -> float:
    return min(2 * pause, max(LONGEST_PAUSE, get_settings().reconcile_seconds))


def _leave(stop: threading.Event) -> None:
    """Files that are being checked go back at once, and cost no attempt."""
    stop.set()
    for lane in LANES:
        lane.leaving.set()


def main() -> None:
    """Entry point."""
    startup.check_or_exit()
    configure()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: _leave(stop))
    log.info("the reconciler is running")
    run(stop)


if __name__ == "__main__":
    main()
