"""Detects that a run hangs, because no event has come for too long.

If one process of several hangs, the others wait for it in their next collective, so each process has a watchdog. A run
of one process is watched by the worker from outside, by the same rule.

A collective has a time limit of its own (`lorainit.runtime.distributed.world`), but gloo then raises an error, while
NCCL ends the process without a message, and later than the limit. Therefore the watchdog's limit is a little shorter
than that of a collective. Loads no torch.
"""

import os
import threading
import time
from collections.abc import Callable

from lorainit.config.events import Event, Failed, Stage

VARIABLE = "RUN_SILENCE_SECONDS"  # environment variable
BEAT_SECONDS = 1.0
DEFAULT_SECONDS = 1800.0  # longer than one process evaluates, writes or reads alone while the others wait
LOADING_FACTOR = 4  # the limit is longer while the base is loaded, because loading emits no events
PEER_GONE = "Another process of this run is gone, or the connection to it."


def time_limit() -> float:
    """After how many seconds without an event a run of several processes counts as hanging."""
    return float(os.environ.get(VARIABLE, DEFAULT_SECONDS))


def timeout_failure(seconds: float | None = None) -> Failed:
    """The event with which the run ends after so many seconds without events; None = the usual limit."""
    seconds = time_limit() if seconds is None else seconds
    return Failed(
        code="worker_lost",
        message=f"The processes of this run do not answer each other: nothing has happened for {seconds:.0f} seconds,"
        " since a device, or the connection between two, hangs.",
    )


class Watchdog:
    """Counts the time without events in beats of this process, so that time in which it was frozen does not count.

    Args:
        allowed: the limit in seconds, which is longer while the base is loaded; None = `time_limit()`.
        extra: more seconds, for the worker, so that the run itself can notice and report first.
    """

    def __init__(self, allowed: float | None = None, *, extra: float = 0.0) -> None:
        self._seconds, self._is_loading = 0.0, True
        self._allowed, self._extra, self._looked = allowed, extra, time.monotonic()

    def reset(self, event: Event) -> None:
        """Start counting again, because an event has come."""
        self._seconds, self._is_loading = 0.0, isinstance(event, Stage) and event.stage == "loading"

    def add_seconds(self, seconds: float) -> bool:
        """Add time that has passed; return whether the limit is exceeded now."""
        self._seconds += seconds
        return self._seconds > self.time_limit

    def is_overdue(self) -> bool:
        """Add the time since the last call; return whether the limit is exceeded.

        To be called more often than once per beat: a longer time counts as one beat, because the process was frozen.
        """
        now = time.monotonic()
        passed, self._looked = min(BEAT_SECONDS, now - self._looked), now
        return self.add_seconds(passed)

    @property
    def time_limit(self) -> float:
        """The limit in seconds that applies at this moment."""
        allowed = time_limit() if self._allowed is None else self._allowed
        return allowed * (LOADING_FACTOR if self._is_loading else 1) + self._extra


def start(watchdog: Watchdog, on_timeout: Callable[[], None]) -> None:
    """Call `on_timeout` once, in a thread, when the limit is exceeded."""

    def run() -> None:
        while not watchdog.add_seconds(BEAT_SECONDS):
            time.sleep(BEAT_SECONDS)
        on_timeout()

    threading.Thread(target=run, name="watchdog", daemon=True).start()
