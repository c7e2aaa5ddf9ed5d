"""The figures of `load.py` as a section of docs/operations.md: requests, the worker's pace, goals."""

import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

SPREAD, SHARE = 5.0, 0.95  # the goals: p99 of polls by their p50, and the worker's pace by its pace alone
FAST = "as fast as it can"


class Given(Protocol):
    """What the command was told."""

    clients: int
    jobs: int
    pause: float
    seconds: float


@dataclass
class Seen:
    """Seconds of each request of the clients, until the first event where it is a stream; events of all streams.

    Requests made while all arrive stand in `arriving`, and in none of the others.
    """

    arriving: list[float] = field(default_factory=list)
    polls: list[float] = field(default_factory=list)
    events: list[float] = field(default_factory=list)
    streams: list[float] = field(default_factory=list)
    streamed: int = 0

    def __iadd__(self, other: "Seen") -> "Seen":
        self.arriving += other.arriving
        self.polls += other.polls
        self.events += other.events
        self.streams += other.streams
        self.streamed += other.streamed
        return self


@dataclass(frozen=True)
class Phase:
    """Steps that were committed a second, microseconds of the worker's CPU for each, and cores that each part used."""

    pace: float
    cost: float
    cores: Mapping[str, float]


@dataclass
class Found:
    """What came of one pace of the worker: all clients' requests, and (quiet, busy) for each turn."""

    seen: Seen = field(default_factory=Seen)
    turns: list[tuple[Phase, Phase]] = field(default_factory=list)

    @property
    def spread(self) -> float:
        """p99 of polls by their p50."""
        cuts = statistics.quantiles(self.seen.polls, n=100)
        return cuts[98] / cuts[49]

    @property
    def share(self) -> float:
        """The worker's pace with the clients by that of the quiet phase before: the median of all turns."""
        return statistics.median(busy.pace / quiet.pace for quiet, busy in self.turns)


def page(alone: Seen, found: dict[str, Found], given: Given, load: float) -> str:
    """The figures as Markdown."""
    everything = [one.seen for one in found.values()]
    phases = sum(len(one.turns) for one in found.values())
    total = sum(len(seen.arriving) + len(seen.polls) + len(seen.events) for seen in everything) / (
        phases * (given.seconds + 1)
    )
    lines = [
        f"{given.clients} clients, {given.jobs} jobs queued, {given.pause:g} s pause: {total:.0f} requests a second;"
        f" {os.cpu_count()} cores shared by clients, API, PostgreSQL, Valkey, reconciler and worker. Phases of"
        f" {given.seconds:g} s. Load average of other programs before the run: {load:.1f}.",
        "",
        f"{given.clients} streams of the running job brought {sum(seen.streamed for seen in everything)} events in all,"
        " none missing or double.",
        "",
        *_requests(alone, found),
        "",
        *_paces(found),
        "",
        *_cores(found),
        "",
        *_goals(found[FAST]),
    ]
    return "\n".join(lines) + "\n"


def _requests(alone: Seen, found: dict[str, Found]) -> list[str]:
    lines = ["| request, while the worker records | p50 | p99 | ratio | requests |", "|---|---|---|---|---|"]
    phases = {"nothing, and without streams": alone, **{words: one.seen for words, one in found.items()}}
    for words, seen in phases.items():
        asked = {"poll a job": seen.polls, "its last 20 events": seen.events, "any, while all arrive": seen.arriving}
        for what, took in {**asked, "a stream's first event": seen.streams}.items():
            if took:
                p50, p99 = (statistics.quantiles(took, n=100)[number] * 1000 for number in (49, 98))
                lines.append(f"| {what}: {words} | {p50:.0f} ms | {p99:.0f} ms | {p99 / p50:.1f} | {len(took)} |")
    return lines


def _paces(found: dict[str, Found]) -> list[str]:
    lines = [
        "| the worker records | quiet | with the clients | ratio of each turn | its CPU a step, of both |",
        "|---|---|---|---|---|",
    ]
    for words, one in found.items():
        quiet, busy = (statistics.median(phase.pace for phase in part) for part in zip(*one.turns, strict=True))
        costs = (statistics.median(phase.cost for phase in part) for part in zip(*one.turns, strict=True))
        ratios = ", ".join(f"{after.pace / before.pace:.2f}" for before, after in one.turns)
        told = " and ".join(f"{cost:.0f} µs" for cost in costs)
        lines.append(f"| {words} | {quiet:.1f} steps/s | {busy:.1f} steps/s | {ratios} | {told} |")
    return lines


def _cores(found: dict[str, Found]) -> list[str]:
    """What everybody used: it says more than a pace where other programs keep the machine busy."""
    phases = {
        f"{words}, {how}": [turn[number] for turn in one.turns]
        for words, one in found.items()
        for number, how in enumerate(("quiet", "with the clients"))
    }
    parts = sorted({part for some in phases.values() for phase in some for part in phase.cores})
    lines = [f"| cores used | {' | '.join(parts)} | all |", "|---" * (2 + len(parts)) + "|"]
    for words, some in phases.items():
        figures = [statistics.median(phase.cores.get(part, 0.0) for phase in some) for part in parts]
        lines.append(f"| {words} | {' | '.join(f'{one:.2f}' for one in [*figures, sum(figures)])} |")
    return lines


def _goals(fast: Found) -> list[str]:
    """Of the worker that goes as fast as it can."""
    goals = [
        (f"p99 of polls at most {SPREAD:g} times their p50", fast.spread, fast.spread <= SPREAD),
        (f"the worker keeps at least {SHARE:g} of its pace", fast.share, fast.share >= SHARE),
    ]
    told = {True: "**met**", False: "**missed**"}
    rows = [f"| {text} | {figure:.2f} | {told[met]} |" for text, figure, met in goals]
    return ["| goal, while the worker records as fast as it can | measured | |", "|---|---|---|", *rows]
