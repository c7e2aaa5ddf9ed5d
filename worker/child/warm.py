"""The process beside a slot that has torch loaded and no run, and forks one for the next run.

A run starts in a tenth of a second that way. Where there is no such process yet, or where it does not answer, the run
is started from scratch as ever. What happens inside is in `lorainit.warm`, why in docs/decisions/0046.
"""

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from math import inf
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from api.core.devices import devices
from api.core.logs import get_logger
from api.core.settings import get_settings
from lorainit.system.warm_protocol import COMMAND_LINE_PADDING, DONE, MAX_MESSAGE, READY
from worker.host.memory import offer_to_the_oom_killer

log = get_logger(__name__)
PROGRAM = (sys.executable, "-P", "-m", "lorainit.warm")
ANSWER_SECONDS = 2.0  # a run that is cancelled meanwhile waits, too
LOOK_SECONDS = 0.5  # between two looks whether a run is still there


class ForkedRun:
    """A run that was forked, with what `subprocess.Popen` has of the same names; the context waits for its end.

    `give_up` ends the process that it was forked from, when that one is silent.
    """

    def __init__(self, pid: int, server: socket.socket, give_up: Callable[[], None]) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._server, self._process, self._give_up = server, psutil.Process(pid), give_up

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.wait()
        with suppress(OSError):
            self._server.send(DONE)

    def abandon(self) -> None:
        """It cannot be ended, and nobody will wait for it: end the process that it was forked from."""
        self._give_up()

    def send_signal(self, number: int) -> None:
        """Nothing happens if it has ended."""
        with suppress(psutil.NoSuchProcess):
            self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL."""
        with suppress(psutil.NoSuchProcess):
            self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, negative for a signal.

        Raises:
            subprocess.TimeoutExpired: it has not ended after `timeout` seconds.
        """
        if self.returncode is None:
            self.returncode = self._ended(timeout)
        return self.returncode

    def _ended(self, timeout: float | None) -> int:
        deadline = inf if timeout is None else time.monotonic() + timeout
        silent_since = inf  # when the run had ended and nobody had said how
        while not (message := self._receive(min(LOOK_SECONDS, max(0.0, deadline - time.monotonic())))):
            now = time.monotonic()
            silent_since = min(silent_since, now) if self._is_over() else inf
            if message == b"" or now - silent_since > ANSWER_SECONDS:
                return self._count_as_killed()
            if now >= deadline:
                raise subprocess.TimeoutExpired("a run", timeout or 0.0)
        return int(json.loads(message)["returncode"])

    def _receive(self, seconds: float) -> bytes | None:
        """What the process says that the run was forked from; None for nothing yet, b"" when it will say no more."""
        self._server.settimeout(seconds)
        try:
            return self._server.recv(MAX_MESSAGE)
        except (TimeoutError, BlockingIOError):
            return None
        except OSError:
            return b""

    def _is_over(self) -> bool:
        try:
            return self._process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def _count_as_killed(self) -> int:
        """Who could say how the run ended has been killed, and the run with it, or is frozen: it counts as killed."""
        self.kill()
        self._give_up()
        psutil.wait_procs([self._process], timeout=5)
        return -9


class WarmProcess:
    """At most one such process, `program` with the number of a socket; it dies with this one."""

    def __init__(self, program: Sequence[str] = PROGRAM) -> None:
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self._server: socket.socket | None = None
        self._ready = False

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        """The process, if it was started and nobody has ended it from here."""
        return self._process

    def prepare(self, environment: Mapping[str, str]) -> None:
        """Start it, unless it is there; it takes seconds to be ready, and nobody waits for it."""
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        self._server, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [*self._program, str(theirs.fileno()), COMMAND_LINE_PADDING],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        offer_to_the_oom_killer(self._process.pid)  # another is started for the next run

    def fork(
        self, arguments: Sequence[str], *, folder: Path, environment: Mapping[str, str], files: Sequence[int]
    ) -> ForkedRun | None:
        """Fork `python -m lorainit` with these arguments; None where it is not ready.

        Args:
            folder: where the run works.
            environment: all of the run's.
            files: the pipe for events and the log.
        """
        if not self.is_ready():
            return None
        assert self._server is not None
        order = {"arguments": list(arguments), "folder": str(folder), "environment": dict(environment)}
        try:
            self._server.settimeout(ANSWER_SECONDS)
            socket.send_fds(self._server, [json.dumps(order).encode()], files)
            return ForkedRun(json.loads(self._server.recv(MAX_MESSAGE))["pid"], self._server, self.close)
        except (OSError, ValueError, psutil.NoSuchProcess) as error:
            log.warning("no run could be forked; it is started from scratch", error=repr(error))
            self.close()  # what it may have forked dies with it
            return None

    def is_ready(self) -> bool:
        """Whether it has loaded everything, and lives."""
        if self._server is None or self._process is None or self._process.poll() is not None:
            return False
        if not self._ready and select.select([self._server], [], [], 0)[0]:
            self._ready = self._server.recv(MAX_MESSAGE) == READY
        return self._ready

    def close(self) -> None:
        """End it, and whatever it forked."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._server is not None:
            self._server.close()
        self._process, self._server, self._ready = None, None, False


@cache
def _of(_pid: int) -> WarmProcess:
    return WarmProcess()


def process_of_slot() -> WarmProcess | None:
    """The one of this process; None where it is not wanted, or where a GPU could be looked at before the fork."""
    wanted = get_settings().keep_warm and sys.platform == "linux" and not devices.list_gpus()
    return _of(os.getpid()) if wanted else None
