"""Ends a command without an error message when the reader of its output has closed the pipe, with exit code 141.

This happens in `lorainit doctor | head -1`. Shells report 141 (128 + SIGPIPE) for other tools in this case. The default
action of the signal, which ends the process, is not used because a broken connection to a client raises it too, and
that must not end a service.
"""

import os
import sys
from collections.abc import Callable

EXIT_CODE = 141


def run(command: Callable[[], int | None]) -> str | int | None:
    """Run a command's main function and write everything that it printed.

    Returns:
        Its exit code, or 141 if nobody reads standard output or standard error any more.
    """
    try:
        try:
            code: str | int | None = command()
        except SystemExit as end:
            # Rich and Typer turn a closed pipe into exit code 1, which would say that the command failed.
            if isinstance(end.__context__, BrokenPipeError):
                raise end.__context__ from None
            code = end.code
        if sys.stdout is not None:  # it is None if the process was started with a closed standard output
            sys.stdout.flush()
    except BrokenPipeError:
        _discard_the_rest()
        return EXIT_CODE
    return code


def _discard_the_rest() -> None:
    """Redirect the streams to nowhere, because Python flushes its buffers at exit and would print an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            os.dup2(nowhere, stream.fileno())
