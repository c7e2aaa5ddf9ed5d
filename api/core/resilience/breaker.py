"""A breaker for a dependency that stops answering: while it is open, nobody waits for the dependency.

An error is an answer, and reaches whoever asked by itself. Silence does not: a frozen server, or a network that
swallows everything, keeps a connection open for as long as it likes. So whoever has heard nothing for a second says
so here, one look is taken for all of them, and if that has no end in time the breaker is open: those who wait are let
go, others are refused at once. It closes by itself, within a second or two of the first look that ends in time.
"""

import threading
import time
from collections.abc import Callable

from api.core.logs import get_logger

DOUBT_SECONDS = 1.0  # of silence, after which we look
LOOK_SECONDS = 2.5  # that a look may take; with the second before it, an answer leaves within five
GOOD_SECONDS = 1.0  # that a look in time stands for
AGAIN_SECONDS = 1.0  # between two looks while it is open


def _in_a_thread(action: Callable[[], None]) -> None:
    threading.Thread(target=action, name="breaker", daemon=True).start()


class Breaker:
    """Open while a dependency is silent.

    `look` asks it for anything; all that counts is whether that ends in time, not how. It should give up by itself
    some seconds after `LOOK_SECONDS`, so that there is a next look.
    """

    def __init__(
        self,
        name: str,
        look: Callable[[], object],
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
        start: Callable[[Callable[[], None]], None] = _in_a_thread,
    ) -> None:
        self.clock = clock
        self._name, self._look, self._pause, self._start = name, look, pause, start
        self._lock = threading.Lock()
        self._watching = False
        self._began: float | None = None  # the look that is being taken now
        self._good_at: float | None = None  # the end of the last one that was in time
        self._open = False

    @property
    def is_open(self) -> bool:
        """Whether it is silent as far as we know; a look that has no end says so, too."""
        began = self._began
        return self._open or (began is not None and self.clock() - began > LOOK_SECONDS)

    def report_silence(self, silent_since: float) -> None:
        """A caller has had no answer since this moment of `clock`. Starts a look if that is long ago and none runs."""
        now = self.clock()
        if now - silent_since < DOUBT_SECONDS:
            return
        with self._lock:
            if self._watching or (self._good_at is not None and now - self._good_at < GOOD_SECONDS):
                return
            self._watching, self._began = True, now
        self._start(self._watch)

    def _watch(self) -> None:
        """Look until it is in time."""
        while not self._is_in_time():
            self._pause(AGAIN_SECONDS)

    def _is_in_time(self) -> bool:
        began = self._began = self.clock()
        try:
            self._look()
        except Exception as error:
            get_logger(__name__).info("a_look_failed", dependency=self._name, error=str(error))
        now = self.clock()
        in_time = now - began <= LOOK_SECONDS
        with self._lock:
            was_open, self._open, self._began = self._open, not in_time, None
            self._watching = not in_time
            self._good_at = now if in_time else self._good_at
        if was_open or self._open:
            get_logger(__name__).warning("answers_again" if in_time else "is_silent", dependency=self._name)
        return in_time
