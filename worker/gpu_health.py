"""Health of a slot's GPUs: after one has failed a run, the slot takes no job until an examination could compute on it.

The slot waits inside its task, so that Celery gives it no message that another slot could take. Which errors count as a
failed GPU, and why a slot becomes usable again by itself, is in docs/decisions/0058.
"""

import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import psutil

from api.core.devices import devices, examination
from api.core.logs import get_logger
from lorainit.config.events import Done, Event, Failed
from worker.child.supervisor import Outcome
from worker.host import scratch
from worker.job.outcomes import DEVICE_FAILED, EXIT_LEASE_LOST, EXIT_WRONG_SPEC

FIRST_WAIT, LONGEST_WAIT = 60.0, 3600.0  # seconds; the wait doubles with each further failure in a row
CHECK_SECONDS = 0.2  # between two checks whether the worker shuts down

log = get_logger(__name__)


class GpuHealth:
    """Remembers whether the GPUs of this slot have failed a run."""

    def __init__(self) -> None:
        self._failures = 0
        self._why: str | None = None
        self._has_ended = set[int]()  # jobs of the present run whose end was reported
        self._stuck: psutil.Process | None = None  # process of a run that was killed and has not ended

    def note_start(self) -> None:
        """A run begins. Forget which jobs of an earlier run have ended."""
        self._has_ended.clear()

    def note_event(self, event: Event) -> None:
        """An event of a run. It may report that a GPU has failed, or that a process hangs, perhaps because of a GPU."""
        if isinstance(event, Done | Failed):
            self._has_ended.add(event.member)
        codes = (DEVICE_FAILED, "worker_lost") if devices.list_gpus() else (DEVICE_FAILED,)
        if isinstance(event, Failed) and event.code in codes:
            self._why = event.message

    def note_end(self, outcome: Outcome, *, members: int) -> None:
        """How a run's process ended. A driver or library may end it when a GPU fails, without a report.

        Args:
            members: how many jobs the run had. A process that ends normally reports the end of each.
        """
        unexplained = len(self._has_ended) < members and outcome.returncode not in (0, EXIT_WRONG_SPEC, EXIT_LEASE_LOST)
        if outcome.stuck is not None:
            self._stuck, self._why = outcome.stuck, _cannot_be_ended(outcome.stuck)
        if outcome.stopped or outcome.is_from_outside or not devices.list_gpus():
            return
        if outcome.hangs:
            self._why = self._why or "The process of a run hung, and was ended."
        elif outcome.crash or unexplained:
            how = f"crashed ({outcome.crash})" if outcome.crash else f"ended without a report ({outcome.returncode})"
            self._why = self._why or f"The process of a run {how}."

    def wait_until_healthy(self, names: str | None, flag: Path, *, is_leaving: Callable[[], bool]) -> None:
        """Call it after each run: returns when the GPUs work, or when the worker shuts down.

        Args:
            names: `CUDA_VISIBLE_DEVICES` of this slot's runs; None = as this process has it.
            flag: a file that exists while this waits, and contains the reason.
        """
        why, self._why = self._why, None
        if why is None:
            self._failures = 0
        while why is not None:
            self._failures += 1
            log.error("no job is taken until the GPU has been examined", reason=why, gpus=names)
            with scratch.raised_flag(flag, why):
                # Not asleep while the worker shuts down, because the shutdown waits for this task.
                if _sleep(_wait_seconds(self._failures), is_leaving):
                    return
                why = self._still_stuck() or examine(names, is_leaving=is_leaving)
        if self._failures:
            log.info("the GPU works; jobs are taken again", failures=self._failures)

    def _still_stuck(self) -> str | None:
        if self._stuck is None or not _is_alive(self._stuck):
            self._stuck = None
            return None
        return _cannot_be_ended(self._stuck)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _cannot_be_ended(process: psutil.Process) -> str:
    return (
        f"Process {process.pid} of a run has been killed and does not end: it waits inside a driver. The kernel's log"
        " (dmesg) may say more. Often only a restart of the machine helps."
    )


def _wait_seconds(failures: int) -> float:
    """Seconds before a GPU is examined that has failed so often in a row. 0 the first time, because most errors affect
    one process only.
    """
    return 0.0 if failures < 2 else min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** min(failures - 2, 60))


def _sleep(seconds: float, is_leaving: Callable[[], bool]) -> bool:
    """Sleep for so many seconds, or until the worker shuts down; True if it does."""
    until = time.monotonic() + seconds
    while not (leaving := is_leaving()) and time.monotonic() < until:
        time.sleep(CHECK_SECONDS)
    return leaving


def examine(names: str | None, *, is_leaving: Callable[[], bool]) -> str | None:
    """What a run would find wrong with these GPUs; None if nothing."""
    try:
        found = examination.examine(names, is_cancelled=is_leaving)
    except examination.Unanswered as why:
        return str(why)
    trouble: str | None = found["machine"]["gpu_trouble"]
    return trouble


@cache
def _of(_pid: int) -> GpuHealth:
    return GpuHealth()


def get_slot_health() -> GpuHealth:
    """The state of this slot. Each process has its own, because a forked copy would be another slot's."""
    return _of(os.getpid())
