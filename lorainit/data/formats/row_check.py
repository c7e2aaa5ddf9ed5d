"""`python -m lorainit.data.formats.row_check SECONDS BYTES`: check the rows that come on stdin, within bounds.

Torch-free.

The rows are anybody's, so whoever reads them may be made to loop, to take all memory or to crash. This process bounds
itself before it reads a byte and knows nothing but the bytes. Its only word, one JSON object on stdout, is the report
(`lorainit.data.formats.file_report.FileReport`) with `status` and `status_details` beside it, or `{"broken": why}`
with exit code 1. What it has no word for, its parent reads from the way it ended: SIGXCPU is the time.
"""

import json
import os
import sys
import traceback

from lorainit.data.formats.file_report import check_file
from lorainit.system import limits


def main(arguments: list[str]) -> int:
    """Check, say what was found, and return the exit code."""
    seconds, most = map(int, arguments)
    limits.lower_priority()
    limits.bound_seconds(seconds)
    limits.bound_memory(most)
    limits.die_with_parent()
    try:
        report = check_file(sys.stdin.buffer)
        found = report.model_dump(mode="json")
        _write_line({"status": report.status, "status_details": report.status_details, "validation": found})
    except MemoryError:
        return _stop_early(f"it took more than {most >> 20} MiB of memory")
    except Exception as error:
        # Its message may quote a row, which is nobody else's to read.
        place = traceback.extract_tb(error.__traceback__)[-1]
        return _stop_early(f"{type(error).__name__} in {place.name}, line {place.lineno}")
    return 0


def _stop_early(why: str) -> int:
    _write_line({"broken": why})
    return 1


def _write_line(word: dict[str, object]) -> None:
    os.write(1, json.dumps(word).encode() + b"\n")


if __name__ == "__main__":
    # At once: nothing is left to be tidied up, and freeing a large row takes time.
    os._exit(main(sys.argv[1:]))
