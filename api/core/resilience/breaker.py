"""A circuit breaker for a dependency that stops answering: while it is open, nobody waits for the dependency.

An error is an answer, and the caller gets it. Silence is not: a frozen server, or a network that drops everything, can
keep a connection open for ever. So a caller that has had no answer for a second reports it here, and one probe is made
for all of them. If the probe does not end in time the breaker opens: callers that wait give up, and new ones are
refused at once. After a probe that ends in time it closes by itself.
"""

import threading
import time
from collections.abc import Callable

from api.core.logs import get_logger

SILENCE_SECONDS = 1.0  # after which a probe is made
PROBE_SECONDS = 2.5  # that a probe may take; with the second before, so that a client is answered within five
GOOD_SECONDS = 1.0  # for which no further probe is made after one that ended in time
AGAIN_SECONDS = 1.0  # between two probes while it is open


def _in_a_thread(action: Callable[[], None]) -> None:
    threading.Thread(target=action, name="breaker", daemon=True).start()


class Breaker:
    """Open while a dependency is silent.

    `probe` asks the dependency for anything. Only whether it ends in time counts, not its result. It should give up by
    itself some seconds after `PROBE_SECONDS`, so that there is a next probe.
    """

    def __init__(
        self,
        name: str,
        probe: Callable[[], object],
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
        start: Callable[[Callable[[], None]], None] = _in_a_thread,
    ) -> None:
        self.clock = clock
        self._name, self._probe, self._pause, self._start = name, probe, pause, start
        self._lock = threading.Lock()
        self._watching = False
        self._began: float | None = None  # when the probe began that has not ended yet
        self._good_at: float | None = None  # when the last probe ended that was in time
        self._open = False

    @property
    def is_open(self) -> bool:
        """Whether the dependency is silent: the last probe took too long, or the present one already does."""
        began = self._began
        return self._open or (began is not None and self.clock() - began > PROBE_SECONDS)

    def report_silence(self, silent_since: float) -> None:
        """A caller has had no answer since this time of `clock`. Starts a probe if that is long ago and none runs."""
        now = self.clock()
        if now - silent_since < SILENCE_SECONDS:
            return
        with self._lock:
            if self._watching or (self._good_at is not None and now - self._good_at < GOOD_SECONDS):
                return
            self._watching, self._began = True, now
        self._start(self._watch)

    def _watch(self) -> None:
        """Probe until a probe ends in time."""
        while not self._is_in_time():
            self._pause(AGAIN_SECONDS)

    def _is_in_time(self) -> bool:
        began = self._began = self.clock()
        try:
            self._probe()
        except Exception as error:
            get_logger(__name__).info("probe_failed", dependency=self._name, error=str(error))
        now = self.clock()
        in_time = now - began <= PROBE_SECONDS
        with self._lock:
            was_open, self._open, self._began = self._open, not in_time, None
            self._watching = not in_time
            self._good_at = now if in_time else self._good_at
        if was_open or self._open:
            get_logger(__name__).warning("answers_again" if in_time else "is_silent", dependency=self._name)
        return in_time
