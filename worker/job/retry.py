"""Repeats actions that failed because the database or storage did not answer, for as long as the run owns its job."""

import threading
from collections.abc import Callable
from typing import TypeVar

from obstore.exceptions import GenericError
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_delay,
    stop_when_event_set,
    wait_exponential,
)

from api.core.logs import get_logger
from api.core.resilience.abandonable import run_abandonable
from worker.job.progress import LeaseLost

Result = TypeVar("Result")

LONGEST_SECONDS = 600  # then another worker tries, because only this one may be cut off
CHECK_SECONDS = 0.1  # between two checks whether the job is lost
# Failed connections, and transactions that PostgreSQL ended because they were idle too long (InternalError).
# Other errors are raised at once, because repeating does not help against a refusal or a bug.
TRANSIENT = (OperationalError, InterfaceError, InternalError, GenericError)


def retry_until_lost(action: Callable[[], Result], *, until: threading.Event) -> Result:
    """Repeat `action`, which must be safe to repeat, until it works or `until` is set.

    Raises:
        LeaseLost: `until` was set first, so the job may belong to another worker by now. The action goes on in its
            thread and what it still writes is refused. So a cancelled job does not keep its worker waiting for an
            upload of ten gigabytes or for a storage that does not answer.
        Exception: the last error of `action`, after ten minutes of retries, or at once if it is not `TRANSIENT`.
    """
    tries = Retrying(
        retry=retry_if_exception_type(TRANSIENT),
        wait=wait_exponential(multiplier=0.2, max=5),
        stop=stop_when_event_set(until) | stop_after_delay(LONGEST_SECONDS),
        sleep=sleep_using_event(until),
        before_sleep=_log_retry,
        reraise=True,
    )
    try:
        result: Result = tries(run_unless_lost, action, until=until)
    except TRANSIENT as error:
        if until.is_set():
            raise LeaseLost from error
        raise
    return result


def run_unless_lost(action: Callable[[], Result], *, until: threading.Event) -> Result:
    """Run `action` once, or leave it alone in its thread when `until` is set before it is done.

    Raises:
        LeaseLost: it was left alone.
    """

    def check() -> None:
        if until.is_set():
            raise LeaseLost

    return run_abandonable(action, name="action", every=CHECK_SECONDS, check=check)


def _log_retry(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    get_logger(__name__).warning("waiting for database or storage", error=str(error), attempt=state.attempt_number)
