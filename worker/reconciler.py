"""The housekeeper: a loop on the database alone that repairs whatever a crash or a lost message left.

    python -m worker.reconciler

Take jobs back from workers that fell silent, check the rows of new files, admit jobs whose files
are checked, ring for queued jobs nobody was told about, finish what cancelled jobs left. Not Celery
beat: beat needs the broker whose losses this loop repairs.
"""

import signal
import threading
from collections.abc import Callable
from datetime import timedelta

from sqlalchemy.exc import OperationalError

from api.core import admission, bells, jobs, metrics, queue, startup
from api.core.db import session_scope
from api.core.logs import configure, get_logger
from api.core.settings import get_settings
from api.core.storage import get_storage
from worker import janitor
from worker.row_checks import LANES

PATIENCE = timedelta(seconds=15)

log = get_logger(__name__)


def recover() -> None:
    """Jobs whose lease ran out go back to the queue, or fail when that happened too often without progress."""
    with session_scope() as session:
        for job_id in jobs.recover_lost(session, max_attempts=get_settings().max_attempts):
            log.warning("took a job back from a silent worker", job_id=job_id)
        session.commit()


def admit() -> None:
    """Jobs whose files are checked become queued or failed, one transaction each."""
    with session_scope(read_only=True) as session:
        ready = admission.waiting(session)
    for job_id in ready:
        with session_scope() as session:
            verdict = admission.consider(session, job_id)
            session.commit()
        log.info("considered", job_id=job_id, verdict=verdict)


def announce() -> None:
    """Ring for jobs that were never announced, and again for those whose message got lost."""
    with session_scope(read_only=True) as session:
        new = bells.unannounced(session)
        forgotten = bells.unheard(session, patience=PATIENCE)
    for bell in [*new, *forgotten]:
        try:
            queue.ring(*bell)
        except queue.BrokerUnavailable as error:
            log.warning("the broker does not answer; jobs stay queued", error=str(error), job_id=bell.job_id)
            return
        with session_scope() as session:
            bells.mark_rung(session, bell.job_id)
            session.commit()


def leave_results() -> None:
    """Ended jobs that logged steps get their result file."""
    with session_scope(read_only=True) as session:
        ended = metrics.ended_without_csv(session)
    for job in ended:
        with session_scope(read_only=True) as session:
            file = metrics.store_csv(session, get_storage(), job)
        with session_scope() as session:
            metrics.attach_csv(session, job.id, file)
            session.commit()


CHORES: tuple[Callable[[], object], ...] = (recover, admit, announce, leave_results, *LANES, *janitor.CHORES)
LONGEST_PAUSE = 30.0


def run(stop: threading.Event) -> None:
    """Every chore over and over, each in its own thread, until `stop` is set.

    A broker that does not answer (seconds per message) or a file of gigabytes holds up nobody else: rows are read by
    processes of their own (`worker.row_checks`).
    """
    threads = [threading.Thread(target=_repeat, args=(chore, stop), name=chore.__name__) for chore in CHORES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _repeat(chore: Callable[[], object], stop: threading.Event) -> None:
    pause = get_settings().reconcile_seconds
    while not stop.is_set():
        more = None
        try:
            more = chore()
            pause = get_settings().reconcile_seconds
        except Exception as error:
            # Twice a second for as long as a disk is full would fill it further.
            pause = min(2 * pause, max(LONGEST_PAUSE, get_settings().reconcile_seconds))
            # Nothing in our code is wrong where a database is away, and a traceback would say no more.
            log.exception(
                "a chore of the reconciler failed; it will be tried again",
                chore=chore.__name__,
                error=str(error),
                exc_info=not isinstance(error, OperationalError),
            )
        if not more:
            stop.wait(pause)


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
