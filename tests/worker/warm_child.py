"""The warm process of a slot, whose runs first do what a test wants of them: the code in BEFORE_RUN, if there is any.

So a test holds or breaks a real run, without a process that loads torch for it alone.
"""

import os
import sys

from lorainit import __main__ as program
from lorainit import warm

BEFORE_RUN = "BEFORE_RUN"
_main = program.main


def main(arguments: list[str]) -> int:
    """The run: what was forked calls it."""
    exec(os.environ.get(BEFORE_RUN, ""), {})
    return _main(arguments)


if __name__ == "__main__":
    program.main = main
    sys.exit(warm.main(sys.argv[1:]))
