"""Whether the kernel has killed something for lack of memory: what tells such a kill from anybody else's."""

from contextlib import suppress
from pathlib import Path

CGROUPS, OWN_CGROUP, HOST = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"), Path("/proc/vmstat")


def oom_kills() -> int | None:
    """How often the out-of-memory killer has struck in our cgroup (v2), or else on this host; None if unknown."""
    for place in (_events_of_our_cgroup(), HOST):
        try:
            lines = place.read_text().splitlines() if place else []
        except OSError:
            continue
        counts = [line.split()[1] for line in lines if line.startswith("oom_kill ")]
        if counts:
            return int(counts[0])
    return None


def offer_to_the_oom_killer(pid: int) -> None:
    """When memory runs out, the system should take this child and leave the worker to report it."""
    with suppress(OSError):  # not Linux, or the child has ended already
        Path(f"/proc/{pid}/oom_score_adj").write_text("900")


def _events_of_our_cgroup() -> Path | None:
    try:
        lines = OWN_CGROUP.read_text().splitlines()
    except OSError:
        return None
    ours = [line.removeprefix("0::") for line in lines if line.startswith("0::")]
    return CGROUPS / ours[0].lstrip("/") / "memory.events" if ours else None
