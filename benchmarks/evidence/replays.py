"""Would halving have kept the winner? Complete experiments are replayed on the curves that were measured.

    python -m benchmarks.evidence.replays [--docs FOLDER] [--count 1000] [--seed 0]

A replay takes a random part of an experiment's treatments and rates, stops cells at the rungs as the service does
(`api.core.experiments.halving`), and compares what is left with what all whole runs say.
"""

import argparse
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from api.core.experiments.halving import RUNGS, Standing, choose_survivors
from api.core.experiments.ranking import Noise
from benchmarks.evidence.evidence import Curve, Evidence, load_evidence

Cell = tuple[str, float]  # a treatment at a learning rate
Curves = Mapping[Cell, Mapping[int, Curve]]  # of each cell, by seed
GOAL_SHARE, GOAL_COST, GOAL_CELLS = 0.9, 6.0, 24
TREATMENTS, RATES = 8, 3  # of a replay, as the goal has them
COUNT = 1000


@dataclass(frozen=True)
class Replay:
    """One replay. `cost`: in whole runs of one seed; `loss`: how much higher the chosen cell ends than the best one."""

    cells: int
    cost: float
    loss: float


@dataclass(frozen=True)
class Replays:
    """Many replays. `kept`: how often the winner itself was chosen; `within`: or one within `noise` of it."""

    count: int
    cells: int
    cost: float
    kept: float
    within: float
    noise: float
    worst: float

    @property
    def meets_goal(self) -> bool:
        """Whether the winner is kept as often as wanted, at the wanted cost for as many cells."""
        return self.within >= GOAL_SHARE and self.cost <= GOAL_COST * self.cells / GOAL_CELLS


def replay(curves: Curves) -> Replay:
    """Halving on these cells, all seeds of a cell together."""
    left, cost, before = list(curves), 0.0, 0.0
    for rung in RUNGS:
        cost, before = cost + len(left) * (rung - before), rung
        standings = [Standing(name, rate, _losses_at(curves[name, rate], rung)) for name, rate in left]
        left = [(str(one.treatment), one.learning_rate) for one in choose_survivors(standings)]
    cost += len(left) * (1.0 - before)
    ends = {cell: _end(found) for cell, found in curves.items()}
    return Replay(len(curves), cost, min(ends[cell] for cell in left) - min(ends.values()))


def _losses_at(curves: Mapping[int, Curve], rung: float) -> dict[int, float]:
    """The loss of each seed at a rung: at the first evaluation that is not before it."""
    found = {}
    for seed, curve in curves.items():
        step = math.ceil(rung * curve[-1]["step"])
        found[seed] = next(point["valid_loss"] for point in curve if point["step"] >= step)
    return found


def _end(curves: Mapping[int, Curve]) -> float:
    return fmean(min(point["valid_loss"] for point in curve if point["step"] > 0) for curve in curves.values())


def run_replays(curves: Curves, noise: Noise, *, count: int, seed: int = 0) -> Replays:
    """Replays of random parts of an experiment.

    Args:
        noise: of the ranking. Cells are within noise of each other if their means differ by no more than means of
            equally good cells do: twice the standard error of such a difference.
    """
    draw = random.Random(seed)
    found = [replay(_draw_part(curves, draw)) for _ in range(count)]
    seeds = min(len(cell) for cell in curves.values())
    limit = 2 * noise.deviation * math.sqrt(2 / seeds)
    return Replays(
        count=count,
        cells=round(fmean(one.cells for one in found)),
        cost=fmean(one.cost for one in found),
        kept=fmean(one.loss == 0.0 for one in found),
        within=fmean(one.loss <= limit for one in found),
        noise=limit,
        worst=max(one.loss for one in found),
    )


def _draw_part(curves: Curves, draw: random.Random) -> Curves:
    """Some treatments, with some neighbouring rates of each, as a grid would have them."""
    names = sorted({name for name, _ in curves})
    part: dict[Cell, Mapping[int, Curve]] = {}
    for name in draw.sample(names, min(TREATMENTS, len(names))):
        rates = sorted(rate for other, rate in curves if other == name)
        first = draw.randrange(max(1, len(rates) - RATES + 1))
        part |= {(name, rate): curves[name, rate] for rate in rates[first : first + RATES]}
    return part


def collect_curves(curves: Mapping[tuple[str, float | None, int], Curve], names: Sequence[str]) -> Curves:
    """The curves of these treatments by cell; cells that lack a seed are left out."""
    found: dict[Cell, dict[int, Curve]] = {}
    for (name, rate, seed), curve in curves.items():
        if name in names and rate is not None:
            found.setdefault((name, rate), {})[seed] = curve
    most = max(map(len, found.values()), default=0)
    return {cell: seeds for cell, seeds in found.items() if len(seeds) == most}


def describe_replays(evidence: Evidence, *, count: int = COUNT, seed: int = 0) -> str:
    """What replays of the first experiment say, in sentences."""
    first = evidence.studies[0]
    noise = evidence.rank([first.key]).noise
    if not evidence.is_complete(first) or noise is None:
        return f"Not known yet: the experiment on {first.title} is incomplete."
    found = run_replays(collect_curves(evidence.curves, first.names), noise, count=count, seed=seed)
    goal = f"at least {GOAL_SHARE:.0%} at {GOAL_COST:g} whole runs for {GOAL_CELLS} cells"
    near = f"a cell within noise of it ({found.noise:.4f} nats) in {found.within:.1%}"
    return (
        f"{found.count:,} replays, each of {found.cells} cells ({TREATMENTS} random initializations, {RATES}"
        f" neighbouring rates) on the measured curves. Halving cost {found.cost:.1f} whole runs for each seed. It"
        f" kept the winner in {found.kept:.1%}, and {near}. In the worst"
        f" replay its choice was {found.worst:.4f} nats behind. The goal, {goal}, is"
        f" {'met' if found.meets_goal else 'missed'}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=Path(__file__).parents[2] / "docs")
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(describe_replays(load_evidence(options.docs / "evidence"), count=options.count, seed=options.seed))


if __name__ == "__main__":
    main()
