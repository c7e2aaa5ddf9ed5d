"""The figures of `benchmarks/api.py` as a section of docs/operations.md."""

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.api_client import THREADS

BARE, POLL, LIST = "a bare route", "a poll of a queued job", "a list of 100 jobs"
MOST_TIMES_BARE, LEAST_A_SECOND, MOST_FOR_A_LIST = 3.0, 1000, 10.0  # the goals


@dataclass(frozen=True)
class Cost:
    """What one request costs: milliseconds of a processor, and seconds until each of many was answered."""

    cpu: float
    took: Sequence[float]
    wall: float

    @property
    def rate(self) -> float:
        """Requests a second."""
        return len(self.took) / self.wall


@dataclass(frozen=True)
class Whole:
    """The complete list of models: its megabytes, seconds, seconds of a processor, and MiB of memory it took."""

    models: int
    megabytes: float
    seconds: float
    cpu: float
    memory: float


@dataclass(frozen=True)
class Found:
    """The figures of one kind of database; the first of `costs` is the bare route's."""

    kind: str
    costs: dict[str, Cost]
    whole: Whole


def page(found: Sequence[Found], *, busy: tuple[float, float]) -> str:
    """The figures as Markdown; `busy`: how many programs wanted a core when it began, and at its end."""
    text = (
        f"{THREADS} connections, {os.cpu_count()} cores shared by client, web process, database and whatever else ran:"
        f" load averages {busy[0]:.1f} before and {busy[1]:.1f} after. A bare route is 1."
    )
    lines = [text, ""]
    lines += [
        "| | database | CPU ms | times a bare route | requests a second | p50 ms | p99 ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found:
        bare = one.costs[BARE].cpu
        for name, it in one.costs.items():
            cuts = statistics.quantiles(it.took, n=100)
            times = f"{1000 * cuts[49]:.1f} | {1000 * cuts[98]:.1f}"
            lines.append(f"| {name} | {one.kind} | {it.cpu:.2f} | {it.cpu / bare:.1f} | {it.rate:.0f} | {times} |")
    lines += ["", *_head("the complete list of models", "database", "MB", "seconds", "CPU s", "memory it takes, MiB")]
    for one in found:
        whole = one.whole
        figures = f"{whole.megabytes:.1f} | {whole.seconds:.1f} | {whole.cpu:.1f} | {whole.memory:.0f}"
        lines.append(f"| {whole.models} adapters | {one.kind} | {figures} |")
    return "\n".join([*lines, "", *goals(found)]) + "\n"


def _head(*names: str) -> list[str]:
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def goals(found: Sequence[Found]) -> list[str]:
    """A line for each goal and database: what was wanted, what was found."""
    lines = []
    for one in found:
        bare, poll, jobs = (one.costs[name] for name in (BARE, POLL, LIST))
        told = [
            (poll.cpu <= MOST_TIMES_BARE * bare.cpu, f"a poll costs at most {MOST_TIMES_BARE:g} times a bare route"),
            (poll.rate >= LEAST_A_SECOND, f"at least {LEAST_A_SECOND} polls a second"),
            (jobs.cpu <= MOST_FOR_A_LIST, f"a list of 100 jobs takes at most {MOST_FOR_A_LIST:g} ms of CPU"),
        ]
        lines += [f"- {one.kind}: {words}: {'held' if held else '**not held in this run**'}." for held, words in told]
    return lines
