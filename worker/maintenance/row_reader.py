"""One child that checks the rows of one file (`lorainit.data.formats.row_check`): feed it, hear it, and judge by how it
ended.

The bytes come through a pipe, so the child needs no credentials, and takes no time while nothing is fed. A file that
makes the child run out of time or memory, or crash, has its verdict at once. A child that others ended says nothing
about the file. Knows neither database nor storage.
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

from api.core.devices.run_environment import without_secrets
from api.core.files.validation import unusable_verdict

MAX_BYTES = 1 << 30  # of memory; the worst lines of 8 MB that were found take less: benchmarks/row_checks.py
BEAT_SECONDS, TICK_SECONDS = 5.0, 0.2
MAX_OUTPUT = 1 << 20
# Signals that come from outside of a process: an operator, a system that shuts down or runs out of memory.
_FROM_OUTSIDE = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}


class Unwanted(Exception):
    """Nobody waits for this check any more."""


class Leaving(Exception):
    """This process is to end."""


class Unreadable(Exception):
    """Storage does not give the bytes."""


class Interrupted(Exception):
    """The child ended, or hung, for a reason that need not be the file's."""


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
        seconds: of a processor that the child may use.
        wanted: asked every few seconds.

    Raises:
        FileNotFoundError: there are no bytes.
        Unwanted, Leaving, Unreadable, Interrupted: there is no verdict.
    """
    watch = _Waiting(leaving, wanted, idle_seconds=60.0 + 10.0 * seconds)
    with _child([*program, str(seconds), str(MAX_BYTES)]) as child:
        try:
            _feed(child, _stored(chunks), watch)
            output = _read_output(child, watch)
        finally:
            child.kill()  # it has said all, or is to say no more; its exit code is set by then
    return _verdict(child.returncode, output, seconds)


def _child(command: list[str]) -> "subprocess.Popen[bytes]":
    """It sets its limits itself before it reads; a session of its own, so that Ctrl+C is only ours."""
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        env=without_secrets(),
        start_new_session=True,
    )


class _Waiting:
    """Asks while something is waited for whether to go on waiting."""

    def __init__(self, leaving: threading.Event, wanted: Callable[[], bool], *, idle_seconds: float) -> None:
        self._leaving, self._wanted, self._idle_seconds = leaving, wanted, idle_seconds
        self._asked = self._moved = time.monotonic()

    def moved(self) -> None:
        """The child took or said something."""
        self._moved = time.monotonic()

    def look(self) -> None:
        clock = time.monotonic()
        if self._leaving.is_set():
            raise Leaving
        if clock - self._moved > self._idle_seconds:
            raise Interrupted(f"it did nothing for {self._idle_seconds:.0f} s")
        if clock - self._asked > BEAT_SECONDS:
            self._asked = clock
            if not self._wanted():
                raise Unwanted


def _stored(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes; whatever fails here is storage's."""
    try:
        yield from chunks
    except FileNotFoundError:
        raise
    except Exception as error:
        raise Unreadable(f"{type(error).__name__}: {error}") from error


def _feed(child: "subprocess.Popen[bytes]", chunks: Iterator[bytes], watch: _Waiting) -> None:
    """Pass all bytes on, as far as the child wants them."""
    assert child.stdin is not None
    os.set_blocking(child.stdin.fileno(), False)
    for chunk in chunks:
        watch.moved()  # storage's time is not the child's
        rest = memoryview(chunk)
        while rest:
            watch.look()
            try:
                taken = _write_some(child.stdin.fileno(), rest)
            except BrokenPipeError:
                return  # it needs no more, or it crashed; its output or exit code tells which
            if taken:
                watch.moved()
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
    """All that the child says, until it ends."""
    assert child.stdout is not None
    output = b""
    while len(output) < MAX_OUTPUT:
        watch.look()
        if select.select([child.stdout], [], [], TICK_SECONDS)[0]:
            if not (part := os.read(child.stdout.fileno(), 1 << 16)):
                break
            output += part
            watch.moved()
    return output


def _verdict(code: int, output: bytes, seconds: int) -> dict[str, object]:
    try:
        report = json.loads(output)
    except ValueError:
        report = {}
    if "status" in report:
        return {name: report[name] for name in ("status", "status_details", "validation")}
    if "broken" in report:
        return unusable_verdict(f"its rows cannot be checked: {report['broken']}")
    if code >= 0 or -code in _FROM_OUTSIDE:  # without output: it crashed before it began, or was killed from outside
        raise Interrupted(f"it ended with {_name(code)}")
    if -code == signal.SIGXCPU:
        return unusable_verdict(f"its rows cannot be checked: it took more than {seconds} s of a processor")
    return unusable_verdict(f"its rows cannot be checked: the process that read them ended with {_name(code)}")


def _name(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
