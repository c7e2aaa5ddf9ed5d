"""Runs a program with a time limit: when the time is over it is killed, and the caller continues."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import IO, NamedTuple

POLL_SECONDS = 0.1


class CommandResult(NamedTuple):
    """The exit code and the output of a program that ended in time."""

    returncode: int
    output: str
    errors: str


def run_command(
    command: Sequence[str],
    *,
    seconds: float,
    environment: Mapping[str, str] | None = None,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> CommandResult | None:
    """Run a program and return its result; None = it was killed, because time was up or the caller cancelled it.

    Args:
        seconds: how long it may take.
        environment: all environment variables of the program; None = those of this process.
        is_cancelled: called several times a second; the program is killed once it returns True.

    Raises:
        OSError: there is no such program, or it cannot be started.
    """
    # Files instead of pipes, because a full pipe would block the program, and a child of it may keep a pipe open.
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            list(command),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )
        try:
            is_over = _wait_until(process, time.monotonic() + seconds, is_cancelled)
        finally:
            _kill(process)
        return CommandResult(process.returncode, _read_text(output), _read_text(errors)) if is_over else None


def _wait_until(process: subprocess.Popen[bytes], until: float, is_cancelled: Callable[[], bool]) -> bool:
    while process.poll() is None:
        if is_cancelled() or time.monotonic() > until:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the program and its children. A process that waits inside a driver may end much later or never, so the
    wait for it is short."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(5)


def _read_text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")
