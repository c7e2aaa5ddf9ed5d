"""How a run is ended from outside: by a signal that asks it to stop, or by a lease that its worker stops renewing.

A lease is a file with a deadline, in seconds of CLOCK_MONOTONIC. If the worker dies, or another worker has taken the
job over, nobody renews the lease, and the run ends itself at the deadline. Otherwise two runs of one job could go on
at the same time. Several runs that share a process have one lease each.
"""

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from lorainit.config.errors import Dropped, Stopped
from lorainit.config.events import Event, OnEvent, Stage, Tick

LEASE_LOST = 75  # exit code of a process whose leases are all past their deadline
POLL_SECONDS = 0.5


class StopRequest:
    """Whether the run has to stop, by a signal or by its leases. It is checked at every event."""

    def __init__(self, leases: Sequence[Path]) -> None:
        self.asked = False
        self.leases = leases

    def ask(self, _signum: int, _frame: FrameType | None) -> None:
        """The signal handler. It only sets a flag, because it may be called in the middle of a step."""
        self.asked = True

    def make_listener(self, who: int, lease: Path | None, on_event: OnEvent) -> OnEvent:
        """`on_event` of run number `who`: it checks stop and lease, and passes the event on with that number.

        Raises:
            Stopped: the run was asked to stop.
            Dropped: the lease of this run is past its deadline, and that of another run in the process is not.
        """

        def listen(event: Event) -> None:
            # Ticks and stages come between two pieces of work. Other events carry results (metrics, a checkpoint), and
            # stopping there would lose them.
            self.check(may_stop=isinstance(event, Tick | Stage))
            # Ticks come from passes that all runs share, where `Dropped` would end the others too.
            if lease and not isinstance(event, Tick) and is_past(lease):
                raise Dropped("The lease of this run is past.")
            on_event(event.model_copy(update={"member": who}) if who else event)

        return listen

    def check(self, *, may_stop: bool) -> None:
        """Exit if all leases are past their deadline. Raise `Stopped` if `may_stop` and a stop was asked for."""
        if self.leases and all(map(is_past, self.leases)):
            os._exit(LEASE_LOST)
        if self.asked and may_stop:
            raise Stopped("The run was asked to stop.")


def watch_leases(leases: Sequence[Path]) -> None:
    """Exit when all leases are past. A thread looks, because one layer's SVD may take longer than a lease."""

    def watch() -> None:
        while not all(map(is_past, leases)):
            time.sleep(POLL_SECONDS)
        os._exit(LEASE_LOST)

    threading.Thread(target=watch, name="lease", daemon=True).start()


def is_past(lease: Path) -> bool:
    """Whether the deadline is over. A lease that cannot be read counts as over, because nobody can be renewing it."""
    try:
        return time.monotonic() > float(lease.read_text())
    except (OSError, ValueError):
        return True
