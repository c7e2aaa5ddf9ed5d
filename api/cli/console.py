"""The two streams of the command line. What is printed stays as it is: people copy names, ids and paths from it.

So neither brackets nor `:rocket:` mean anything here; a style is said with `rich.text.Text` or `style=`.
"""

import sys

from rich.console import Console

# A pipe has no width: what goes into one is never cut.
_PIPE_COLUMNS = 400


def plain(*, stderr: bool = False) -> Console:
    """A console on standard output or standard error."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream is not None and stream.isatty() else _PIPE_COLUMNS  # it is None where it was closed
    return Console(stderr=stderr, soft_wrap=True, highlight=False, markup=False, emoji=False, width=width)


out = plain()
err = plain(stderr=True)
