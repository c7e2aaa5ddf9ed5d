"""Notices that a run hangs: no event has come for too long.

If one process of several hangs, the others wait for it in their next sum, so each process watches itself. A run of one
process cannot watch itself: the worker does it from outside, by the same rule.

A sum has a time limit of its own (`lorainit.runtime.distributed.world`), but its effect depends on the library: gloo
raises an error, while NCCL ends the process without a message, and starts its clock late. So the watchdog's limit is a
little shorter than that of a sum. Torch-free.
"""

import os
import threading
import time
from collections.abc import Callable

from lorainit.config.events import Event, Failed, Stage

VARIABLE = "RUN_SILENCE_SECONDS"  # of the environment
BEAT_SECONDS = 1.0  # seconds
DEFAULT_SECONDS = 1800.0  # the longest that one evaluates, writes or reads alone while the others wait
LOADING_FACTOR = 4  # times as long may pass while the base is loaded, of which nothing is told
PEER_GONE = "Another process of this run is gone, or the connection to it."


def time_limit() -> float:
    """Seconds without an event after which a run of several processes is over."""
    return float(os.environ.get(VARIABLE, DEFAULT_SECONDS))


def timeout_failure(seconds: float | None = None) -> Failed:
    """What the run ends with after so many seconds; None = the usual limit."""
    seconds = time_limit() if seconds is None else seconds
    return Failed(
        code="worker_lost",
        message=f"The processes of this run do not answer each other: nothing has happened for {seconds:.0f} seconds,"
        " since a device, or the connection between two, hangs.",
    )


class Watchdog:
    """How long no event has come, in beats of a clock of this process: time in which it is frozen does not count.

    Args:
        usual: seconds that are too many, except while the base is loaded; None = `time_limit()`.
        later: seconds more, for one who lets the run itself notice it first.
    """

    def __init__(self, allowed: float | None = None, *, extra: float = 0.0) -> None:
        self._seconds, self._is_loading = 0.0, True
        self._allowed, self._extra, self._looked = allowed, extra, time.monotonic()

    def reset(self, event: Event) -> None:
        """Start anew, because an event has come."""
        self._seconds, self._is_loading = 0.0, isinstance(event, Stage) and event.stage == "loading"

    def add_seconds(self, seconds: float) -> bool:
        """Count time that has passed; returns whether it is too long now."""
        self._seconds += seconds
        return self._seconds > self.time_limit

    def is_overdue(self) -> bool:
        """`add_seconds`, for one who looks more often than that; a longer time between two looks counts as one beat."""
        now = time.monotonic()
        passed, self._looked = min(BEAT_SECONDS, now - self._looked), now
        return self.add_seconds(passed)

    @property
    def time_limit(self) -> float:
        """Seconds without an event that are too many at this moment."""
        allowed = time_limit() if self._allowed is None else self._allowed
        return allowed * (LOADING_FACTOR if self._is_loading else 1) + self._extra


def start(watchdog: Watchdog, on_timeout: Callable[[], None]) -> None:
    """Call `on_timeout` once, in a thread, when it has lasted too long."""

    def run() -> None:
        while not watchdog.add_seconds(BEAT_SECONDS):
            time.sleep(BEAT_SECONDS)
        on_timeout()

    threading.Thread(target=run, name="silence", daemon=True).start()
