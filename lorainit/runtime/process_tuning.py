"""Sets a process up for a run: memory, threads, which library multiplies matrices; each setting with its reason.

For processes that do nothing but run: the worker's child, and `python -m lorainit` on the command line. Somebody who
calls `run()` from their own program keeps their own settings, because these are global to the process. What a person
has set in the environment is never overridden. torch reads some settings when it is loaded, so it is loaded after them.
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

# mallopt's names (malloc.h) and the variables by which glibc takes the same from the environment.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_MALLOC_VARIABLES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
_TOP_PAD_BYTES = 256 << 20


def tune_process() -> Message:
    """Set this process up for a run, once, before anything has loaded torch; takes about 0.2 s beside that.

    Returns:
        The event that says what was chosen.
    """
    if not settings.recorded():
        kept, waiting, gpu = tune_before_torch()
        from lorainit.runtime import matmul  # loads torch, which reads the environment once

        products = matmul.tune_matmul(cpus=usable_cpus(), vendor=processor_vendor())
        memory = [kept, gpu] if matmul.has_gpu() else [kept]
        for setting in (*memory, waiting, *products):
            settings.record(setting)
    return settings_event()


@cache
def tune_before_torch() -> tuple[Setting, Setting, Setting]:
    """The part of `tune_process` that comes before torch is loaded, once: for a process that loads it for later
    runs."""
    return keep_freed_memory(), _let_threads_sleep(), _let_gpu_memory_grow()


def keep_compiled_kernels(cache: str | None) -> None:
    """Let what torch compiles be found by the next run; without this it lies in the run's own folder and goes with it.

    Where the environment says another place, that is taken.
    """
    if cache is not None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(cache) / KERNELS))


def settings_event() -> Message:
    """The record as an event of kind `machine`."""
    found = settings.recorded()
    text = "This machine: " + "; ".join(f"{one.name} = {one.value}" for one in found)
    choices = [{"name": one.name, "value": one.value, "why": one.why, **one.measured} for one in found]
    return Message(message=text, data={"kind": "machine", "choices": choices})


# --- memory --------------------------------------------------------------------------------------


def keep_freed_memory() -> Setting:
    """Let glibc keep what is freed: by default it hands freed logits back and page-faults them in again at every step.

    SmolLM2 in fp32, 2 rows: 33,000 to 45,000 page faults in the median step by default; about 110 with these three
    calls, as with glibc's variables for the same. A fault was cheap where this was counted, and times did not
    differ; it was dear on the machine where the variables were first tried (docs/machine.md). Peak memory grows by
    1 to 15 %.
    """
    name = "allocator"
    if given := [variable for variable in _MALLOC_VARIABLES if variable in os.environ]:
        return Setting(name, "as given", f"{', '.join(given)} is set in the environment")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return Setting(name, "the system's", "only glibc's allocator is known to need anything")
    # No block gets a mapping of its own, none is given back (-1 = never), the heap grows in large pieces.
    done = mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1) and mallopt(_M_TOP_PAD, _TOP_PAD_BYTES)
    if not done:
        return Setting(name, "the system's", "this C library refused to keep freed memory")
    return Setting(name, "keeps freed memory", "memory given back and fetched again costs page faults at every step")


# --- what torch reads when it is loaded ------------------------------------------------------------


def _let_threads_sleep() -> Setting:
    """A short spin, then sleep. Seconds per step of SmolLM2 in bf16 with 4 rows on two cores, alone and with one busy:

    sleep at once 1.76 and 2.4; spin 1000 times 1.2 and 2.7; 3000 times 1.2 and 3.7; 20000 times 1.2 and 9.4.
    """
    why = "threads that wait look a moment for work, then sleep: what else runs here needs the core"
    return _set_variable("waiting threads", "GOMP_SPINCOUNT", value="1000", why=why)


def _let_gpu_memory_grow() -> Setting:
    """Rows of many lengths leave holes that no other length fits into. Has not run: no GPU was at hand."""
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
    """Cores this process may keep busy: those it may run on, and no more than its cgroup's quota, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min(allowed, cpu_quota(root))))


def cpu_quota(root: Path = Path("/")) -> float:
    """CPU seconds per second that the cgroup (v1 or v2) and those above it grant; infinite without a limit.

    Args:
        root: where `proc` and `sys` lie.
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
    """The file of a group and of all above it; in a container the lower ones are not visible, only the mount."""
    group = mount / path.lstrip("/")
    folders = [group, *group.parents]
    return [folder / name for folder in folders[: folders.index(mount) + 1] if (folder / name).is_file()]


def _parse_quota(text: str) -> float:
    """`quota period` in microseconds; `max` and -1 are no limit."""
    quota, period = text.split()
    return math.inf if quota == "max" or int(quota) <= 0 else int(quota) / int(period)
