"""Whether a dependency works: many callers share few checks, and a single failed check does not count.

A good result is reused for some seconds. After a failed check the next one follows in a second, and "does not work" is
reported only after some seconds of failures, or if no check was ever good. The reason is that an orchestrator stops
sending requests to a service that reports it.
"""

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from api.core.logs import get_logger

GOOD_SECONDS = 5.0  # for which a good result is reused
AGAIN_SECONDS = 1.0  # between a failed check and the next one
TOLERATED_SECONDS = 3.0  # of failures, before they are reported
BOUND_SECONDS = 2.0  # that a caller waits for a check, because a check may hang; it has a thread of its own


Found = TypeVar("Found")


class Probe(Generic[Found]):
    """The checks of one dependency by this process. `check` raises if it does not work; `found` is its last result.

    Many callers share one check, so that a crowd of health checks is no load on the dependency.
    """

    def __init__(
        self,
        name: str,
        check: Callable[[], Found],
        *,
        good_seconds: float = GOOD_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.found: Found | None = None
        self._name, self._check, self._good_seconds, self._clock = name, check, good_seconds, clock
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._checked: float | None = None  # when the last check ended
        self._began: float | None = None  # when the check began that has not ended yet
        self._bad_since: float | None = None
        self._was_good = False

    def works(self) -> bool:
        """Whether the dependency works. Begins a check if the last one is old and none is under way.

        Only the caller that began it waits for its end; before the first result, all callers do. None waits longer than
        `BOUND_SECONDS`.
        """
        if self._begin_if_due() or self._checked is None:
            self._ended.wait(BOUND_SECONDS)
        return self._is_working()

    def _begin_if_due(self) -> bool:
        with self._lock:
            if self._began is not None or not self._is_due():
                return False
            began = self._began = self._clock()
            self._ended.clear()
        threading.Thread(target=self._run_check, args=(began,), name=f"check of {self._name}", daemon=True).start()
        return True

    def _is_due(self) -> bool:
        pause = self._good_seconds if self._bad_since is None else AGAIN_SECONDS
        return self._checked is None or self._clock() - self._checked > pause

    def _run_check(self, began: float) -> None:
        try:
            self.found = self._check()
        except Exception as error:
            self._bad_since = began if self._bad_since is None else self._bad_since
            get_logger(__name__).warning(f"{self._name}_unavailable", error=str(error))
        else:
            self._was_good, self._bad_since = True, None
        with self._lock:
            self._checked, self._began = self._clock(), None
            self._ended.set()

    def _is_working(self) -> bool:
        """Whether the failures have not lasted too long. A check that has not ended counts as failed since it began."""
        began = self._began
        bad_since = began if self._bad_since is None else self._bad_since
        return self._was_good and (bad_since is None or self._clock() - bad_since < TOLERATED_SECONDS)
