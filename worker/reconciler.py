"""The reconciler: a loop that repairs what a crash or a lost message left. It needs only the database.

    python -m worker.reconciler

It requeues jobs of silent workers, checks the rows of new files, admits jobs whose files are checked, notifies workers
of queued jobs, moves experiments on, and writes result files of cancelled jobs. It is not Celery beat, because that
needs the broker, whose lost messages this loop sends again.

One query every `LORAINIT_RECONCILE_SECONDS` finds out which chores have work, and wakes them. After a chore that did
something the next query follows at once: when a file is checked, its jobs are admitted and workers notified without a
pause. In addition each chore runs once a minute, or as often as `janitor.PAUSES` says.
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
from api.core.experiments import advance
from api.core.experiments.auto.consider import consider
from api.core.files.storage import get_storage
from api.core.jobs import admission, jobs, metrics
from api.core.logs import configure, get_logger
from api.core.maintenance import pending, startup
from api.core.queue import notify, queue
from api.core.settings import get_settings
from worker.maintenance import janitor
from worker.maintenance.row_checks import LANES

Item = TypeVar("Item")

NOTIFY_AGAIN_AFTER = timedelta(seconds=15)  # a free worker reads a message at once, so an older one is lost

log = get_logger(__name__)


class Chore(Protocol):
    """A task of the reconciler. It returns True if it did something, because there may be more to do."""

    __name__: str

    def __call__(self) -> object:
        """Do it once."""


def recover() -> bool:
    """Requeue jobs whose lease ran out. A job fails if that happened too often without progress.

    True if some were requeued.
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
    """Queue or fail jobs whose files are checked, in one transaction each; True if there were some."""
    with session_scope(read_only=True) as session:
        ready = admission.find_ready(session)
    return any(_for_each(ready, _consider))


def _consider(job_id: str) -> bool:
    with session_scope() as session:
        decision = consider(session, job_id)
        session.commit()
    log.info("considered", job_id=job_id, decision=decision)
    return decision != "waiting"


def announce() -> bool:
    """Notify workers of jobs that had no message yet, and of those whose message was lost; True if there were some."""
    with session_scope(read_only=True) as session:
        waiting = [*notify.find_unannounced(session), *notify.find_lost(session, older_than=NOTIFY_AGAIN_AFTER)]
    for notification in waiting:
        try:
            queue.notify_workers(*notification)
        except queue.BrokerUnavailable as error:
            log.warning("the broker does not answer; jobs stay queued", error=str(error), job_id=notification.job_id)
            return False
        # After the message, because a job that is marked without one would wait for `find_lost`.
        with session_scope() as session:
            notify.mark_notified(session, notification.job_id)
            session.commit()
    return bool(waiting)


def advance_experiments() -> bool:
    """Bring experiments up to date, in one transaction each; True if there were some."""
    with session_scope(read_only=True) as session:
        due = advance.find_due(session)
    return any(_for_each(due, _advance))


def _advance(experiment_id: str) -> bool:
    with session_scope() as session:
        advance.advance(session, experiment_id)
        session.commit()
    return True


def write_result_files() -> bool:
    """Write the result files of ended jobs that have none; True if there were some."""
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
    """The results of `do`. An error of one item does not stop the others; the first error is raised at the end.

    An error of the database is raised at once, because the other items would fail, too.
    """
    results, errors = list[bool](), list[Exception]()
    for item in items:
        try:
            results.append(do(item))
        except OperationalError:
            raise
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return results


CHORES: tuple[Chore, ...] = (
    recover,
    admit,
    announce,
    advance_experiments,
    write_result_files,
    *LANES,
    janitor.clear,
    *janitor.PAUSES,
)
# The chores for each kind of pending work (`pending.PendingWork`).
WOKEN: Mapping[str, Sequence[Chore]] = {
    "lost": [recover],
    "validating": [admit],
    "queued": [announce],
    "unwritten": [write_result_files],
    "experiments": [advance_experiments],
    "unchecked": LANES,
    "uncleared": [janitor.clear],
}
# Each chore runs at least this often, so that work which the query missed is only delayed.
SWEEP_SECONDS = 60.0
LONGEST_PAUSE = 30.0


def run(stop: threading.Event) -> None:
    """Run every chore again and again until `stop` is set.

    Each has a thread of its own, so that a broker that does not answer (seconds per message) or a large file does not
    delay the others.
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
    """Wake all threads once `stop` is set, so that they end."""
    stop.wait()
    for event in (look, *wakes.values()):
        event.set()


def _wake_chores(look: threading.Event, wakes: Mapping[Chore, threading.Event], stop: threading.Event) -> None:
    """Query for pending work and wake its chores; again when `look` is set, or after a pause."""
    pause = get_settings().reconcile_seconds
    with ExitStack() as held:
        connection: Connection | None = None  # kept open, because opening one takes longer than the query
        while not stop.is_set():
            look.clear()
            try:
                connection = connection or held.enter_context(plain_connection())
                found = pending.find_pending(connection)
                pause = get_settings().reconcile_seconds
            except Exception as error:
                pause = _lengthen(pause)
                log.warning("the reconciler could not look for work", error=str(error))
                found = None
            for chore in _find_chores(found):
                if chore in wakes:
                    wakes[chore].set()
            look.wait(pause)


def _find_chores(found: pending.PendingWork | None) -> list[Chore]:
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
            # The pause grows, because two log lines a second would fill a full disk further.
            pause = _lengthen(pause)
            # No traceback if the database or storage does not answer, because that is no error in our code.
            write_line = log.warning if isinstance(error, OperationalError | StoreError) else log.exception
            write_line(
                "a chore of the reconciler failed; it will be tried again", chore=chore.__name__, error=str(error)
            )
            stop.wait(pause)
            continue
        if more:
            look.set()
        else:
            wake.wait(janitor.PAUSES.get(chore, SWEEP_SECONDS))


def _lengthen(pause: float) -> float:
    return min(2 * pause, max(LONGEST_PAUSE, get_settings().reconcile_seconds))


def _leave(stop: threading.Event) -> None:
    """Stop. Files that are being checked are released at once, without counting an attempt."""
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
