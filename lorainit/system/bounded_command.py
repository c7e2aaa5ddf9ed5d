"""A program that is asked something and may never answer: it gets a time limit, and nobody waits longer than that."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import IO, NamedTuple

LOOK_SECONDS = 0.1


class Answer(NamedTuple):
    """What a program left when it ended by itself."""

    returncode: int
    output: str
    errors: str


def ask(
    command: Sequence[str],
    *,
    seconds: float,
    environment: Mapping[str, str] | None = None,
    is_unwanted: Callable[[], bool] = lambda: False,
) -> Answer | None:
    """What the program answers; None = it was killed, since time was up or the answer is not wanted any more.

    Args:
        seconds: how long it may take.
        environment: all of the program's; None = as this process.
        is_unwanted: asked several times a second.

    Raises:
        OSError: there is no such program, or it cannot be started.
    """
    # Files and no pipes: nobody has to read them meanwhile, and what the program started may keep them open.
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
            is_over = _await(process, time.monotonic() + seconds, is_unwanted)
        finally:
            _kill(process)
        return Answer(process.returncode, _text(output), _text(errors)) if is_over else None


def _await(process: subprocess.Popen[bytes], until: float, is_unwanted: Callable[[], bool]) -> bool:
    while process.poll() is None:
        if is_unwanted() or time.monotonic() > until:
            return False
        time.sleep(LOOK_SECONDS)
    return True


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End it and what it started; a process that waits inside a driver dies when the driver lets it go, or never."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(5)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")
