"""Whether the kernel has killed a process for lack of memory, so that such a kill can be told from others."""

from contextlib import suppress
from pathlib import Path

CGROUPS, OWN_CGROUP, HOST = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"), Path("/proc/vmstat")


def count_oom_kills() -> int | None:
    """How many processes the out-of-memory killer has ended in our cgroup (v2), or on this host; None if unknown."""
    for source in (_events_of_our_cgroup(), HOST):
        try:
            lines = source.read_text().splitlines() if source else []
        except OSError:
            continue
        counts = [line.split()[1] for line in lines if line.startswith("oom_kill ")]
        if counts:
            return int(counts[0])
    return None


def offer_to_the_oom_killer(pid: int) -> None:
    """Mark this child as the first to be killed when memory runs out, so that the worker is left to report it."""
    with suppress(OSError):  # not Linux, or the child has ended already
        Path(f"/proc/{pid}/oom_score_adj").write_text("900")


def _events_of_our_cgroup() -> Path | None:
    try:
        lines = OWN_CGROUP.read_text().splitlines()
    except OSError:
        return None
    ours = [line.removeprefix("0::") for line in lines if line.startswith("0::")]
    return CGROUPS / ours[0].lstrip("/") / "memory.events" if ours else None
