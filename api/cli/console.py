"""The two output streams of the command line.

Text is printed unchanged, because people copy names, ids and paths from it. So rich's markup in brackets and its emoji
codes are off; a style is given with `rich.text.Text` or `style=`.
"""

import sys

from rich.console import Console

# A pipe has no width. This one is so large that programs which read it get whole lines.
_PIPE_COLUMNS = 400


def make_console(*, stderr: bool = False) -> Console:
    """A console on standard output or standard error."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream is not None and stream.isatty() else _PIPE_COLUMNS  # it is None if it was closed
    return Console(stderr=stderr, soft_wrap=True, highlight=False, markup=False, emoji=False, width=width)


out = make_console()
err = make_console(stderr=True)
