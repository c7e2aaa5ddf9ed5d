"""What hostile files cost the process that checks their rows: seconds of a processor and the most memory it took.

    python benchmarks/row_checks.py

Each file is one line of about 8 MB, given to `python -m lorainit.row_check` as the reconciler gives it.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LINE = 7_900_000  # bytes; a longer line is refused unread
SECONDS, BYTES = 120, 4 << 30  # far above the service's own limits, so that what is printed is the need
BETWEEN = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss, sep="\\n")
"""


def called(count: int) -> bytes:
    """A row of `count` calls of functions, each with its answer: an answer refers to the last call before it."""
    messages = list[dict[str, Any]]()
    for number in range(count):
        call = {"name": f"f{number % 97}", "arguments": "{}"}
        messages += [{"role": "assistant", "content": None, "function_call": call}]
        messages += [{"role": "function", "name": call["name"], "content": "1"}]
    return json.dumps({"messages": [{"role": "user", "content": "go"}, *messages]}).encode()


def filled(item: bytes) -> bytes:
    """A row whose messages are as many `item`s as a line may hold."""
    return b'{"messages": [' + b",".join([item] * (LINE // (len(item) + 1))) + b"]}"


def schema() -> bytes:
    """A row with a tool whose schema has as many objects as a line may hold."""
    objects = b",".join([b"{}"] * (LINE // 3))
    tool = b'{"type": "function", "function": {"name": "f", "parameters": {"enum": [' + objects + b"]}}}"
    return (
        b'{"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": "1"}], "tools": ['
        + tool
        + b"]}"
    )


def cost(line: bytes) -> tuple[float, float, str]:
    """Seconds, MiB, and what came of it."""
    command = [sys.executable, "-m", "lorainit.row_check", str(SECONDS), str(BYTES)]
    with tempfile.TemporaryFile() as stdin:
        stdin.write(line + b"\n")
        stdin.seek(0)
        # The system counts a parent's memory as its child's, so a small process stands between.
        ran = subprocess.run(
            [sys.executable, "-c", BETWEEN, *command], cwd=ROOT, stdin=stdin, capture_output=True, check=True
        )
    word, seconds, kibibytes = (json.loads(part) for part in ran.stdout.decode().splitlines())
    return seconds, kibibytes / 1024, str(word.get("status", word))


def main() -> None:
    files = {f"{count:,} calls and answers": called(count) for count in (12_000, 24_000, 48_000)}
    files |= {"numbers instead of messages": filled(b"1"), "`{}` instead of messages": filled(b"{}")}
    files["a schema of objects"] = schema()
    print("| one line | MB | seconds | MiB | |\n|---|---:|---:|---:|---|")
    for name, line in files.items():
        seconds, memory, status = cost(line)
        print(f"| {name} | {len(line) / 1e6:.1f} | {seconds:.2f} | {memory:.0f} | {status} |", flush=True)


if __name__ == "__main__":
    main()
