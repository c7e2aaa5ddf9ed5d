"""The real child of a worker on a machine that fails while an adapter is verified, in the way that FAILS names.

In the environment: FAILS, empty where nothing fails; CHECK, the number of the check that it fails in. The first one
comes before the first step, the second one is that of the download.
"""

import itertools
import mmap
import os
import signal
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lorainit import __main__
from lorainit.runtime import process_tuning


def report(words: str) -> None:
    raise RuntimeError(words)


def touch_memory_without_room() -> None:
    """As a process does that writes to a full /dev/shm: the file behind the memory ends before it."""
    with TemporaryDirectory() as folder, (Path(folder) / "file").open("w+b") as file:
        file.truncate(mmap.PAGESIZE)
        memory = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        file.truncate(0)
        memory[0] = 1


WAYS = {
    "CUDA": lambda: report("CUDA error: uncorrectable ECC error encountered\nCompile with TORCH_USE_CUDA_DSA"),
    "abort": os.abort,
    "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "bus error": touch_memory_without_room,
    "shared memory": lambda: report(
        "unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device (28)"
    ),
}


def fail_when_compared() -> None:
    from lorainit.export import check

    compare, numbers = check._compare, itertools.count(1)

    def compared(*args: Any, **named: Any) -> Any:
        if next(numbers) == int(os.environ["CHECK"]):
            WAYS[os.environ["FAILS"]]()
        return compare(*args, **named)

    check._compare = compared


if __name__ == "__main__":
    if os.environ["FAILS"]:
        process_tuning.tune_process()  # before anything else loads torch
        fail_when_compared()
    sys.exit(__main__.main())
