"""Child processes of `lorainit serve`: they end with their parent, and are restarted when they crash.

Knows processes and log files, but not what runs in them.
"""

import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

import psutil

from lorainit.system.limits import make_parent_death_hook

LONGEST_PAUSE = 30.0
HEALTHY_AFTER = 60.0  # a child that ran for so long starts again without the pauses of earlier failures
LOG_LIMIT = 16 * 2**20  # at which a log is rotated when its child starts, so that crash loops do not fill the disk


@dataclass
class Child:
    """One process that should be running; its output goes to `log`."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    pass_fds: Sequence[int] = ()
    grace: float = 5.0
    failures: int = 0
    start_at: float = 0.0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        """Start it now. It ends when this process does, even by `kill -9`."""
        if self.log.exists() and self.log.stat().st_size > LOG_LIMIT:
            self.log.replace(self.log.with_suffix(".log.1"))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=self.pass_fds,
                # A session of its own, because Ctrl+C reaches the whole foreground group and we stop children in order.
                start_new_session=True,
                preexec_fn=make_parent_death_hook(),
            )
        self.start_at = time.monotonic()

    def restart_if_ended(self) -> str | None:
        """Start it again if it has ended, after a longer pause each time. Returns a sentence if it has just ended."""
        clock = time.monotonic()
        if self.process is None:
            if clock >= self.start_at:
                self.start()
            return None
        code = self.process.poll()
        if code is None:
            return None
        self.failures = 1 if clock - self.start_at > HEALTHY_AFTER else self.failures + 1
        pause = min(LONGEST_PAUSE, 0.5 * 2.0 ** (self.failures - 1))
        self.process, self.start_at = None, clock + pause
        return f"{self.name} ended ({_ending(code)}); starting it again in {pause:.1f} s, see {self.log}"

    def seconds_to_start(self) -> float:
        """Seconds until it will be started again; infinite while it runs."""
        return inf if self.process is not None else max(0.0, self.start_at - time.monotonic())

    def stop(self) -> None:
        """SIGTERM, wait `grace` seconds, then kill it with everything below it."""
        if self.process is None:
            return
        family = _family(self.process.pid)
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(self.grace)
            except subprocess.TimeoutExpired:
                family += _family(self.process.pid)
                self.process.kill()
        for member in family:
            with suppress(psutil.NoSuchProcess):  # it may end between any two lines here
                member.kill()
        self.process.wait()
        self.process = None


@contextmanager
def sleeping() -> Iterator[Callable[[float], None]]:
    """A sleep of so many seconds that ends early when a child ends or another signal is handled.

    Only for the main thread. A signal since the last sleep ends the next one at once.
    """
    reader, writer = os.pipe()
    for end in (reader, writer):
        os.set_blocking(end, False)
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    handler = signal.signal(signal.SIGCHLD, lambda *_: None)  # a signal without a handler does not write to the pipe

    def sleep(seconds: float) -> None:
        if select.select([reader], [], [], seconds)[0]:
            os.read(reader, 4096)

    try:
        yield sleep
    finally:
        signal.signal(signal.SIGCHLD, handler)
        signal.set_wakeup_fd(previous)
        os.close(reader)
        os.close(writer)


def read_tail(path: Path, *, lines: int = 15) -> str:
    """The end of a log, for an error message."""
    if not path.exists():
        return ""
    return "\n".join(path.read_text("utf-8", "replace").splitlines()[-lines:])


def follow(path: Path, *, start: int) -> Iterator[list[str]]:
    """What was added to `path` since the last call of next(), in whole lines; never ends."""
    position = start
    while True:
        size = size_of(path)
        if size < position:
            position = 0  # the file was rotated
        lines: list[str] = []
        if size > position:
            with path.open("rb") as file:
                file.seek(position)
                fresh = file.read(size - position)
            complete = fresh[: fresh.rfind(b"\n") + 1]
            position += len(complete)
            lines = complete.decode("utf-8", "replace").splitlines()
        yield lines


def size_of(path: Path) -> int:
    """Bytes of a file; 0 if there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _family(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _ending(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name
