"""Ends a run of several processes when one of them hangs: the others would wait for it in their next sum.

A sum has a time limit of its own (`lorainit.world`), but what comes of it depends on who adds up: gloo raises an error,
NCCL ends the process without a word, and it begins to wait long after it was asked. So each process notices a little
earlier, by itself, that nothing happens any more. Torch-free.
"""

import os
import threading
import time
from collections.abc import Callable

from lorainit.events import Event, Failed, Stage

SECONDS = "RUN_SILENCE_SECONDS"  # of the environment
BEAT = 1.0  # seconds
USUAL = 1800.0  # the longest that one evaluates, writes or reads alone while the others wait


def limit() -> float:
    """Seconds without an event after which a run of several processes is over."""
    return float(os.environ.get(SECONDS, USUAL))


def failure() -> Failed:
    """What the run ends with."""
    return Failed(
        code="internal_error",
        message=f"The processes of this run do not answer each other: nothing has happened for {limit():.0f} seconds."
        " A device, or the connection between two, hangs. The run can go on from its last checkpoint.",
    )


class Silence:
    """How long no event has come, in beats of a clock of this process: time in which it is frozen does not count."""

    def __init__(self) -> None:
        self._seconds: float | None = None

    def hear(self, event: Event) -> None:
        """Something has happened. While the base is loaded, nothing is told, and that may take long."""
        self._seconds = None if isinstance(event, Stage) and event.stage == "loading" else 0.0

    def beat(self, seconds: float) -> bool:
        """So much time has passed; whether it has been too long."""
        if self._seconds is not None:
            self._seconds += seconds
        return self._seconds is not None and self._seconds > limit()


def watch(silence: Silence, on_silence: Callable[[], None]) -> None:
    """Call `on_silence` once, in a thread, when it has lasted too long."""

    def run() -> None:
        while not silence.beat(BEAT):
            time.sleep(BEAT)
        on_silence()

    threading.Thread(target=run, name="silence", daemon=True).start()
