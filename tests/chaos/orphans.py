"""Training processes that nobody watches over any more. They may live as long as their lease, and no longer."""

import time
from contextlib import suppress

import psutil

from tests.chaos.fleet import LEASE_SECONDS, Fleet

LOOK_SECONDS = 1.0
# A lease, the half second at which a trainer's guard looks, and a scheduler that is busy elsewhere.
GRACE_SECONDS = LEASE_SECONDS + 1.5


class Orphans:
    """Looks now and then for processes of runs whose parent is no supervisor of ours."""

    def __init__(self, fleet: Fleet) -> None:
        self.found: list[str] = []
        self._fleet, self._mark = fleet, f"{fleet.place}/state/runs"
        self._since: dict[psutil.Process, float] = {}
        self._next = 0.0

    def look(self) -> None:
        """Once a second: who is alone, and for how long already?"""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + LOOK_SECONDS
        alone = set(self._alone())
        self._since = {one: self._since.get(one, time.monotonic()) for one in alone}
        for one, since in self._since.items():
            sentence = f"process {one.pid} lives without a supervisor"
            if time.monotonic() - since > GRACE_SECONDS and sentence not in self.found:
                self.found.append(sentence)

    def _alone(self) -> list[psutil.Process]:
        # The second process of a run is watched by the first.
        watched = {one.pid for one in (*self._fleet.supervisors(), *self._fleet.trainers())}
        alone = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if self._is_a_run(process) and process.ppid() not in watched:
                    alone.append(process)
        return alone

    def _is_a_run(self, process: psutil.Process) -> bool:
        return any(self._mark in word for word in process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE
