"""`python -m lorainit.data.formats.row_check SECONDS BYTES`: check the rows that come on stdin, with limits.

Anybody may upload rows, and a malicious file may make its reader loop, take all memory or crash. So this process limits
its own time and memory before it reads a byte, and it is given nothing but the bytes. It writes one JSON object to
stdout: the report (`lorainit.data.formats.file_report.FileReport`) with `status` and `status_details` beside it, or
`{"broken": why}` with exit code 1. If it can write nothing, its parent knows the reason from the way it ended; SIGXCPU
means that the time was over. Does not import torch.
"""

import json
import os
import sys
import traceback

from lorainit.data.formats.file_report import check_file
from lorainit.system import limits


def main(arguments: list[str]) -> int:
    """Check the rows, write the report, and return the exit code."""
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
        # The message of the error is left out, because it may quote a row, and rows must not get into logs.
        place = traceback.extract_tb(error.__traceback__)[-1]
        return _stop_early(f"{type(error).__name__} in {place.name}, line {place.lineno}")
    return 0


def _stop_early(why: str) -> int:
    _write_line({"broken": why})
    return 1


def _write_line(word: dict[str, object]) -> None:
    os.write(1, json.dumps(word).encode() + b"\n")


if __name__ == "__main__":
    # Without Python's cleanup, because there is nothing to clean up and freeing a large row takes time.
    os._exit(main(sys.argv[1:]))
