"""What files cost the process that checks their rows: seconds of a processor and the most memory it took.

    python benchmarks/row_checks.py

Hostile files are one line of about 8 MB. Ordinary ones have `ORDINARY` bytes of rows, and beside them stands what
reading the same lines with Python's own parser takes, and doing nothing with them. Each is given to
`python -m lorainit.data.formats.row_check` as the reconciler gives it.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
ORDINARY = 100_000_000
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


def ordinary(kind: str, length: int) -> Iterator[bytes]:
    """Rows of about `length` bytes: chats, or chats with a call of a function."""
    words = ["please", "the", "order", "of", "a", "blue", "lamp", "came", "late", "and", "broken,", "said", "she"]
    for number in range(ORDINARY // length):
        text = " ".join([str(number), *words * (length // 150)])
        answer: dict[str, Any] = {"role": "assistant", "content": f"{text}: done."}
        if kind == "calls":
            function = {"name": "order", "arguments": json.dumps({"id": number, "text": "blue \u00e9"})}
            answer |= {"tool_calls": [{"id": "c1", "type": "function", "function": function}]}
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}, answer]
        yield json.dumps({"messages": messages}).encode()


def parsing(file: IO[bytes]) -> float:
    """Seconds that Python's own parser takes for the lines."""
    started = time.process_time()
    for line in file:
        json.loads(line)
    return time.process_time() - started


def cost(lines: Iterable[bytes], *, beside: bool = False) -> tuple[float, float, str, float, int]:
    """Seconds, MiB, what came of it, seconds of parsing alone if that is asked for `beside`, and bytes."""
    command = [sys.executable, "-m", "lorainit.data.formats.row_check", str(SECONDS), str(BYTES)]
    with tempfile.TemporaryFile() as stdin:
        stdin.writelines(line + b"\n" for line in lines)
        size = stdin.tell()
        stdin.seek(0)
        alone = parsing(stdin) if beside else 0.0
        stdin.seek(0)
        # The system counts a parent's memory as its child's, so a small process stands between.
        ran = subprocess.run(
            [sys.executable, "-c", BETWEEN, *command], cwd=ROOT, stdin=stdin, capture_output=True, check=True
        )
    word, seconds, kibibytes = (json.loads(part) for part in ran.stdout.decode().splitlines())
    return seconds, kibibytes / 1024, str(word.get("status", word)), alone, size


def main() -> None:
    files = {f"{count:,} calls and answers": called(count) for count in (12_000, 24_000, 48_000)}
    files |= {"numbers instead of messages": filled(b"1"), "`{}` instead of messages": filled(b"{}")}
    files["a schema of objects"] = schema()
    print("| one line | MB | seconds | MiB | |\n|---|---:|---:|---:|---|")
    for name, line in files.items():
        seconds, memory, status, _, size = cost([line])
        print(f"| {name} | {size / 1e6:.1f} | {seconds:.2f} | {memory:.0f} | {status} |", flush=True)
    print("\n| rows | seconds for 1 GB | MiB | times Python's own parser alone |\n|---|---:|---:|---:|")
    for kind, length in (("chats", 400), ("chats", 700), ("chats", 3000), ("calls", 700), ("calls", 3000)):
        seconds, memory, _, alone, size = cost(ordinary(kind, length), beside=True)
        whole = seconds * 1e9 / size
        print(f"| {kind} of {length} bytes | {whole:.0f} | {memory:.0f} | {seconds / alone:.1f} |", flush=True)


if __name__ == "__main__":
    main()
