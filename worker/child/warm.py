"""The warm process of a slot: it has loaded torch, and forks the process of the next run.

So a run starts in a tenth of a second. If there is no warm process yet, or if it does not answer, a new process is
started for the run. `lorainit.warm` is the code inside it; the reasons are in docs/decisions/0046.
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
ANSWER_SECONDS = 2.0  # short, because a run that is cancelled meanwhile waits for the answer, too
LOOK_SECONDS = 0.5  # between two checks whether a run still exists


class ForkedRun:
    """A run that was forked, with the interface of `subprocess.Popen`; leaving the context waits for its end.

    `give_up` ends the process that it was forked from, for when that does not answer.
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
        """Stop waiting for a run that cannot be ended, and end the process that it was forked from."""
        self._give_up()

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
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
        silent_since = inf  # since when the run has ended, but its exit code was not reported
        while not (message := self._receive(min(LOOK_SECONDS, max(0.0, deadline - time.monotonic())))):
            now = time.monotonic()
            silent_since = min(silent_since, now) if self._is_over() else inf
            if message == b"" or now - silent_since > ANSWER_SECONDS:
                return self._count_as_killed()
            if now >= deadline:
                raise subprocess.TimeoutExpired("a run", timeout or 0.0)
        return int(json.loads(message)["returncode"])

    def _receive(self, seconds: float) -> bytes | None:
        """A message of the process that the run was forked from; None if there is none yet, b"" if none will come."""
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
        """End the run as killed, because the process that could report its exit code is gone or frozen."""
        self.kill()
        self._give_up()
        psutil.wait_procs([self._process], timeout=5)
        return -9


class WarmProcess:
    """At most one warm process: `program`, with the number of a socket as argument. It ends with this process."""

    def __init__(self, program: Sequence[str] = PROGRAM) -> None:
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self._server: socket.socket | None = None
        self._ready = False

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        """The process, if it was started and not closed."""
        return self._process

    def prepare(self, environment: Mapping[str, str]) -> None:
        """Start it, unless it runs already. It needs seconds to load torch, which nobody waits for."""
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
                start_new_session=True,  # so that Ctrl+C in a terminal reaches only the worker
            )
        offer_to_the_oom_killer(
            self._process.pid
        )  # the first to be killed when memory runs out, because it can be started again

    def fork(
        self, arguments: Sequence[str], *, folder: Path, environment: Mapping[str, str], files: Sequence[int]
    ) -> ForkedRun | None:
        """Fork `python -m lorainit` with these arguments; None if the warm process is not ready.

        Args:
            folder: the run's working folder.
            environment: all environment variables of the run.
            files: the pipe for events, and the log.
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
            log.warning("no run could be forked; a new process is started for it", error=repr(error))
            self.close()  # this also ends a run that it may have forked
            return None

    def is_ready(self) -> bool:
        """Whether it has loaded everything and is alive."""
        if self._server is None or self._process is None or self._process.poll() is not None:
            return False
        if not self._ready and select.select([self._server], [], [], 0)[0]:
            self._ready = self._server.recv(MAX_MESSAGE) == READY
        return self._ready

    def close(self) -> None:
        """End it, and the run that it forked."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._server is not None:
            self._server.close()
        self._process, self._server, self._ready = None, None, False


@cache
def _of(_pid: int) -> WarmProcess:
    return WarmProcess()


def get_warm_process() -> WarmProcess | None:
    """The warm process of this slot; None if it is switched off, or with GPUs, because a fork cannot use CUDA that its
    parent has started.
    """
    wanted = get_settings().keep_warm and sys.platform == "linux" and not devices.list_gpus()
    return _of(os.getpid()) if wanted else None
