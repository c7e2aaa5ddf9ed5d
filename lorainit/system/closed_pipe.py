"""The end of a command whose reader has left, as in `lorainit doctor | head -1`: quiet, with exit code 141.

A shell reports 141 (128 + SIGPIPE) for every tool that ends so. We do not let the signal end the process: it would
also come from a client's connection that breaks, which must not end a service.
"""

import os
import sys
from collections.abc import Callable

EXIT_CODE = 141


def run(command: Callable[[], int | None]) -> str | int | None:
    """Run a command's main function to its end, and all that it printed out of the process.

    Returns:
        Its exit code, or 141 where nobody reads standard output or standard error any more.
    """
    try:
        try:
            code: str | int | None = command()
        except SystemExit as end:
            # Rich and Typer turn a closed pipe into exit code 1, which would say that the command failed.
            if isinstance(end.__context__, BrokenPipeError):
                raise end.__context__ from None
            code = end.code
        if sys.stdout is not None:  # as it is where whoever started us had closed it
            sys.stdout.flush()
    except BrokenPipeError:
        _discard_the_rest()
        return EXIT_CODE
    return code


def _discard_the_rest() -> None:
    """Python writes what is left in its buffers when it ends, and would complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            os.dup2(nowhere, stream.fileno())
