"""Runs the child that checks the rows of one file (`lorainit.data.formats.row_check`): sends it the bytes, reads its
output, and derives the result.

The bytes go through a pipe, so the child needs no credentials and uses no time while it waits for them. A file is bad
if the child runs out of time or memory or crashes. If somebody else ended the child, there is no result. This module
knows neither database nor storage.
"""

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

from api.core.devices.run_environment import make_environment_without_secrets
from api.core.files.validation import unusable_result

MAX_BYTES = 1 << 30  # of memory; the worst lines of 8 MB that are known need less (benchmarks/row_checks.py)
BEAT_SECONDS, TICK_SECONDS = 5.0, 0.2  # the first well below a claim's 30 seconds, so that it is renewed in time
MAX_OUTPUT = 1 << 20  # of a report, so that a broken child does not fill our memory
# Signals that somebody else sends: an operator, or a system that shuts down or runs out of memory.
_FROM_OUTSIDE = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}


class Unwanted(Exception):
    """The result is not needed any more."""


class Leaving(Exception):
    """This process has to end."""


class Unreadable(Exception):
    """Storage cannot be read."""


class Interrupted(Exception):
    """The child ended or hung, perhaps for a reason that has nothing to do with the file."""


def read(
    chunks: Iterator[bytes],
    *,
    seconds: int,
    leaving: threading.Event,
    wanted: Callable[[], bool],
    program: tuple[str, ...] = (sys.executable, "-m", "lorainit.data.formats.row_check"),
) -> dict[str, object]:
    """Check the rows in `chunks`; the columns `status`, `status_details` and `validation` of the file.

    Args:
        seconds: processor time that the child may use.
        wanted: called every few seconds; False ends the check.

    Raises:
        FileNotFoundError: there are no bytes.
        Unwanted, Leaving, Unreadable, Interrupted: there is no result.
    """
    watch = _Waiting(leaving, wanted, idle_seconds=60.0 + 10.0 * seconds)
    with _start_child([*program, str(seconds), str(MAX_BYTES)]) as child:
        try:
            _feed(child, _read_storage(chunks), watch)
            output = _read_output(child, watch)
        finally:
            child.kill()  # no effect if it has ended; its exit code is set by then
    return _make_result(child.returncode, output, seconds)


def _start_child(command: list[str]) -> "subprocess.Popen[bytes]":
    """The child sets its own limits before it reads. It has a session of its own, so that Ctrl+C reaches only us."""
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        env=make_environment_without_secrets(),
        start_new_session=True,
    )


class _Waiting:
    """Decides whether to go on waiting for the child."""

    def __init__(self, leaving: threading.Event, wanted: Callable[[], bool], *, idle_seconds: float) -> None:
        self._leaving, self._wanted, self._idle_seconds = leaving, wanted, idle_seconds
        self._asked = self._moved = time.monotonic()

    def note_progress(self) -> None:
        """Note that the child has read or written something."""
        self._moved = time.monotonic()

    def check(self) -> None:
        """Raise if the child does nothing, if this process ends, or if the result is not needed any more."""
        clock = time.monotonic()
        if self._leaving.is_set():
            raise Leaving
        if clock - self._moved > self._idle_seconds:
            raise Interrupted(f"it did nothing for {self._idle_seconds:.0f} s")
        if clock - self._asked > BEAT_SECONDS:
            self._asked = clock
            if not self._wanted():
                raise Unwanted


def _read_storage(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes. Any error in here is one of storage, so that it can be told from the child's."""
    try:
        yield from chunks
    except FileNotFoundError:  # a result of its own, because it does not help to try again
        raise
    except Exception as error:
        raise Unreadable(f"{type(error).__name__}: {error}") from error


def _feed(child: "subprocess.Popen[bytes]", chunks: Iterator[bytes], watch: _Waiting) -> None:
    """Send the bytes, until the end or until the child reads no more."""
    assert child.stdin is not None
    os.set_blocking(child.stdin.fileno(), False)  # so that a child that reads nothing does not block us
    for chunk in chunks:
        watch.note_progress()  # because time spent in storage is not the child's
        rest = memoryview(chunk)
        while rest:
            watch.check()
            try:
                taken = _write_some(child.stdin.fileno(), rest)
            except BrokenPipeError:
                return  # it needs no more or it crashed, as its output or exit code will show
            if taken:
                watch.note_progress()
            rest = rest[taken:]
    child.stdin.close()


def _write_some(pipe: int, rest: memoryview) -> int:
    """How many bytes the pipe took within a moment."""
    ready = select.select([], [pipe], [], TICK_SECONDS)[1]
    try:
        return os.write(pipe, rest[: 1 << 16]) if ready else 0
    except BlockingIOError:
        return 0


def _read_output(child: "subprocess.Popen[bytes]", watch: _Waiting) -> bytes:
    """The child's output, until it ends."""
    assert child.stdout is not None
    output = b""
    while len(output) < MAX_OUTPUT:
        watch.check()
        if select.select([child.stdout], [], [], TICK_SECONDS)[0]:
            if not (part := os.read(child.stdout.fileno(), 1 << 16)):
                break
            output += part
            watch.note_progress()
    return output


def _make_result(code: int, output: bytes, seconds: int) -> dict[str, object]:
    try:
        report = json.loads(output)
    except ValueError:
        report = {}
    if "status" in report:
        return {name: report[name] for name in ("status", "status_details", "validation")}
    if "broken" in report:
        return unusable_result(f"its rows cannot be checked: {report['broken']}")
    if code >= 0 or -code in _FROM_OUTSIDE:  # no output: it failed before it began, or somebody else killed it
        raise Interrupted(f"it ended with {_name(code)}")
    if -code == signal.SIGXCPU:
        return unusable_result(f"its rows cannot be checked: it took more than {seconds} s of a processor")
    return unusable_result(f"its rows cannot be checked: the process that read them ended with {_name(code)}")


def _name(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
