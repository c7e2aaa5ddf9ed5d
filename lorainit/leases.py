"""What ends a run from outside: a signal that asks it to stop, and the leases that its worker renews.

A lease is a file with a deadline, in seconds of CLOCK_MONOTONIC. A run whose worker is gone, or has lost the job to
another worker, ends by itself when the deadline is over. Several runs that share a process have one lease each.
"""

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from lorainit.config.errors import Dropped, Stopped
from lorainit.config.events import Event, OnEvent, Stage, Tick

LEASE_LOST = 75  # exit code of a process none of whose leases holds any more
POLL_SECONDS = 0.5


class StopRequest:
    """What a signal or a lease asks for, checked at every event."""

    def __init__(self, leases: Sequence[Path]) -> None:
        self.asked = False
        self.leases = leases

    def ask(self, _signum: int, _frame: FrameType | None) -> None:
        """The signal handler: only remembers."""
        self.asked = True

    def listener(self, who: int, lease: Path | None, on_event: OnEvent) -> OnEvent:
        """What a run's `on_event` does before it passes an event on, as that of member `who`."""

        def listen(event: Event) -> None:
            # A stop is heeded between two pieces of work; what has been done is told all the same.
            self.check(heed=isinstance(event, Tick | Stage))
            # Ticks come from the middle of a pass that all members share; all else from the member's own work.
            if lease and not isinstance(event, Tick) and is_past(lease):
                raise Dropped("The lease of this run is past.")
            on_event(event.model_copy(update={"member": who}) if who else event)

        return listen

    def check(self, *, heed: bool) -> None:
        """Exit when all leases are past; raise `Stopped` when somebody asked and that is to be heeded now."""
        if self.leases and all(map(is_past, self.leases)):
            os._exit(LEASE_LOST)
        if self.asked and heed:
            raise Stopped("The run was asked to stop.")


def watch_leases(leases: Sequence[Path]) -> None:
    """Exit when all are past. From a thread, since one layer's SVD may take longer than a lease."""

    def watch() -> None:
        while not all(map(is_past, leases)):
            time.sleep(POLL_SECONDS)
        os._exit(LEASE_LOST)

    threading.Thread(target=watch, name="lease", daemon=True).start()


def is_past(lease: Path) -> bool:
    """Whether the deadline is over; a lease that cannot be read protects nobody and counts as over."""
    try:
        return time.monotonic() > float(lease.read_text())
    except (OSError, ValueError):
        return True
