"""Limits that a process sets on itself before it reads files that it does not trust. Loads no torch.

Linux enforces all of them. Other systems lack some, and there only the parent's own time limit protects.
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
    """Limit the bytes of writable memory of this process; private writable mappings of files count too."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    with suppress(OSError, ValueError):  # the system has no such limit, or a lower one is set already
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def bound_seconds(most: int) -> None:
    """Limit the CPU seconds of this process. SIGXCPU then ends it, without a core file."""
    import resource

    with suppress(OSError, ValueError):  # a lower limit is set already
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CPU, (most, most + 1))


def die_with_parent(code: int = 1) -> None:
    """On Linux, have the kernel kill this process when its parent ends; exit with `code` if it has ended already."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(code)  # the parent ended before the request was made, so no signal would come


def make_parent_death_hook() -> Callable[[], None]:
    """A `preexec_fn` with which a child asks the kernel to kill it when its parent ends. Works on Linux only.

    It is done before the child becomes its program, because otherwise a child that is frozen early would stay behind.
    The kernel sends the signal when the *thread* that started the child ends, so that thread must live long enough.
    """
    parent = os.getpid()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def before_exec() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent:
            os._exit(1)  # the parent ended before the request was made, so no signal would come

    return before_exec


def lower_priority() -> None:
    """Give other processes priority, and let the kernel kill this one first when the machine runs out of memory."""
    os.nice(10)
    with suppress(OSError):  # not Linux
        Path("/proc/self/oom_score_adj").write_text("1000")
