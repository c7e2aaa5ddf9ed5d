"""Limits that a process sets on itself before it reads files of strangers. Torch-free.

Linux enforces all of them. A limit that another system does not have is left out there; the parent has a time limit of
its own.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def bound_memory(most: int) -> None:
    """Bound the bytes that this process may write to; what is mapped from files counts too."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    with suppress(OSError, ValueError):  # a system that knows no such limit, or has set a lower one
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def bound_seconds(most: int) -> None:
    """Bound the seconds of a processor that this process may use: SIGXCPU ends it, and leaves no core file."""
    import resource

    with suppress(OSError, ValueError):  # a lower limit is set already
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CPU, (most, most + 1))


def die_with_parent(code: int = 1) -> None:
    """On Linux, die when the process that started this one does, however it dies; exit with `code` if it is dead."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(code)  # it died before we asked


def make_parent_death_hook() -> Callable[[], None]:
    """What a child does before it becomes its program (`preexec_fn`): ask the kernel to die with its parent.

    So there is no moment, however early it is frozen, in which it could stay behind. The signal is sent when the
    *thread* that started the child ends, so start children from one that lives as long as they may. Only Linux has it.
    """
    parent = os.getpid()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def before_exec() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent:
            os._exit(1)  # the parent died before the request was in place

    return before_exec


def lower_priority() -> None:
    """Let other processes go first, and be the first one that is killed when the machine runs out of memory."""
    os.nice(10)
    with suppress(OSError):  # not Linux
        Path("/proc/self/oom_score_adj").write_text("1000")
