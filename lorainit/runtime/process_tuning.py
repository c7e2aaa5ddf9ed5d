"""Sets a process up for a run: memory, threads, and the library that multiplies matrices, each with its reason.

Used by processes that do nothing else: the worker's child, and `python -m lorainit` on the command line. A program that
calls `run()` itself keeps its own settings, because these are global to the process. Variables that a person has set in
the environment are never overridden. torch reads some settings only when it is loaded, so it is loaded after them.
"""

import ctypes
import math
import os
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

from lorainit.config.cache_names import KERNELS
from lorainit.config.events import Message
from lorainit.runtime import settings
from lorainit.runtime.settings import Setting

# The parameters of mallopt (malloc.h), and the environment variables with the same effect.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_MALLOC_VARIABLES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
_TOP_PAD_BYTES = 256 << 20


def tune_process() -> Message:
    """Set this process up for a run, once, before anything has loaded torch. Takes about 0.2 s beside loading torch.

    Returns:
        The event that reports the chosen settings.
    """
    if not settings.list_recorded():
        kept, waiting, gpu = tune_before_torch()
        from lorainit.runtime import matmul  # not before, because this loads torch, which reads the environment once

        products = matmul.tune_matmul(cpus=usable_cpus(), vendor=processor_vendor())
        memory = [kept, gpu] if matmul.has_gpu() else [kept]
        for setting in (*memory, waiting, *products):
            settings.record(setting)
    return settings_event()


@cache
def tune_before_torch() -> tuple[Setting, Setting, Setting]:
    """The settings that must be made before torch is loaded. Made once, also by a process that loads torch for later
    runs."""
    return keep_freed_memory(), _let_threads_sleep(), _let_gpu_memory_grow()


def keep_compiled_kernels(cache: str | None) -> None:
    """Keep the kernels that torch compiles in the cache, so that later runs need not compile them again.

    Without this they are in the run's own folder and are deleted with it. A folder from the environment takes
    precedence.
    """
    if cache is not None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(cache) / KERNELS))


def settings_event() -> Message:
    """The recorded settings as an event of kind `machine`."""
    found = settings.list_recorded()
    text = "Process settings: " + "; ".join(f"{one.name} = {one.value}" for one in found)
    choices = [{"name": one.name, "value": one.value, "why": one.why, **one.measured} for one in found]
    return Message(message=text, data={"kind": "machine", "choices": choices})


# --- memory --------------------------------------------------------------------------------------


def keep_freed_memory() -> Setting:
    """Let glibc keep freed memory. By default it returns large blocks, so each step pays page faults for its logits.

    SmolLM2 in fp32, 2 rows: 33,000 to 45,000 page faults in the median step by default, and about 110 with these three
    calls or with glibc's environment variables. How much time that saves depends on the machine: none on the one where
    the faults were counted, much on the one where the variables were first tried (docs/machine.md). Peak memory grows
    by 1 to 15 %.
    """
    name = "allocator"
    if given := [variable for variable in _MALLOC_VARIABLES if variable in os.environ]:
        return Setting(name, "as given", f"{', '.join(given)} is set in the environment")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return Setting(name, "the system's", "only glibc's allocator is known to need anything")
    # In this order: no block gets a mapping of its own, because freeing it would return it; the heap is never trimmed
    # (-1); and the heap grows in large pieces.
    done = mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1) and mallopt(_M_TOP_PAD, _TOP_PAD_BYTES)
    if not done:
        return Setting(name, "the system's", "this C library refused to keep freed memory")
    return Setting(name, "keeps freed memory", "memory given back and fetched again costs page faults at every step")


# --- what torch reads when it is loaded ------------------------------------------------------------


def _let_threads_sleep() -> Setting:
    """Let idle OpenMP threads spin only a short time before they sleep, because other programs need the cores too.

    Measured with SmolLM2 in bf16, 4 rows, two cores, in seconds per step, on an idle machine and with one core busy:
    sleep at once 1.76 and 2.4; spin 1000 times 1.2 and 2.7; 3000 times 1.2 and 3.7; 20000 times 1.2 and 9.4.
    """
    why = "threads that wait look a moment for work, then sleep: what else runs here needs the core"
    return _set_variable("waiting threads", "GOMP_SPINCOUNT", value="1000", why=why)


def _let_gpu_memory_grow() -> Setting:
    """Let CUDA's memory segments grow, because rows of many lengths otherwise leave gaps that no other length fits.

    Not tried on a real GPU yet.
    """
    older = "PYTORCH_CUDA_ALLOC_CONF"
    variable = older if older in os.environ else "PYTORCH_ALLOC_CONF"
    why = "memory grows in place instead of leaving holes"
    return _set_variable("GPU memory", variable, value="expandable_segments:True", why=why)


def _set_variable(name: str, variable: str, *, value: str, why: str) -> Setting:
    if variable in os.environ:
        return Setting(name, os.environ[variable], f"{variable} is set in the environment")
    if "torch" in sys.modules:
        return Setting(name, "as it was", "torch was loaded before it could be set")
    os.environ[variable] = value
    return Setting(name, value, why)


# --- the processor, and how many of its cores are ours -------------------------------------------


def processor_vendor(root: Path = Path("/")) -> str | None:
    """`GenuineIntel`, `AuthenticAMD`, ...; None where Linux does not say (other systems, ARM)."""
    with suppress(OSError):
        for line in (root / "proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "vendor_id":
                return value.strip()
    return None


def usable_cpus(root: Path = Path("/")) -> int:
    """How many cores this process may use, at least 1: limited by its CPU affinity and by its cgroup's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min(allowed, cpu_quota(root))))


def cpu_quota(root: Path = Path("/")) -> float:
    """CPU seconds per second that the cgroup (v1 or v2) and its parents allow; infinite without a limit.

    Args:
        root: the folder that contains `proc` and `sys`.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return math.inf  # not Linux
    found = [math.inf]
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            found += [_parse_quota(f.read_text()) for f in _group_files(root / "sys/fs/cgroup", path, "cpu.max")]
        elif "cpu" in controllers.split(","):
            for file in _group_files(root / "sys/fs/cgroup" / controllers, path, "cpu.cfs_quota_us"):
                found.append(_parse_quota(f"{file.read_text()} {file.with_name('cpu.cfs_period_us').read_text()}"))
    return min(found)


def _group_files(mount: Path, path: str, name: str) -> list[Path]:
    """The file of a cgroup and of its parents, as far as they exist: a container sees only the mounted top."""
    group = mount / path.lstrip("/")
    folders = [group, *group.parents]
    return [folder / name for folder in folders[: folders.index(mount) + 1] if (folder / name).is_file()]


def _parse_quota(text: str) -> float:
    """Cores from a `quota period` pair in microseconds; a quota of `max` or -1 means no limit."""
    quota, period = text.split()
    return math.inf if quota == "max" or int(quota) <= 0 else int(quota) / int(period)
