"""After the answer to a create: admit the new job if its files are checked, then notify the workers.

The reconciler does both if this fails. So when the broker did not answer, this process sends no message for a while
and leaves that to the reconciler, because each try would wait for the broker again.
"""

import time
from collections.abc import Callable

from api.core import logs
from api.core.db.database import session_scope
from api.core.experiments.auto.consider import consider
from api.core.queue import notify, queue
from api.http.threads import run_in_broker_thread

PAUSE_SECONDS = 5.0  # in which the reconciler announces jobs, because each message would wait in vain here


class JobAnnouncer:
    """Announces new jobs to the workers, for this process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._paused_until = clock()

    async def announce(self, job_id: str) -> None:
        """Announce a job whose row is committed."""
        await run_in_broker_thread(self._announce, job_id)

    def _announce(self, job_id: str) -> None:
        log = logs.get_logger(__name__).bind(job_id=job_id)
        try:
            with session_scope() as session:
                consider(session, job_id)
                notification = notify.find_notification(session, job_id)
                session.commit()
            if notification is not None and self._clock() >= self._paused_until:
                self._notify(notification)
        except queue.BrokerUnavailable as error:
            self._paused_until = self._clock() + PAUSE_SECONDS
            log.warning("broker_unavailable", error=str(error), left_alone_seconds=PAUSE_SECONDS)
        except Exception:  # only logged, because the answer was sent and the reconciler repeats this
            log.exception("announce_failed")

    def _notify(self, notification: notify.Notification) -> None:
        queue.notify_workers(*notification)
        with session_scope() as session:
            notify.mark_notified(session, notification.job_id)
            session.commit()
