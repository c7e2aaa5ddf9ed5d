"""What `rate_prediction` keeps of a run: its sweep over rates, and measures of its start. Loads no torch."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

PER_DECADE = 3  # rates per factor of ten: 1e-4, 2.2e-4, 4.6e-4, 1e-3, ...
KEPT_GAIN = 0.95  # a rate that keeps this share of the best rate's gain is as good as the best
MOST = 14  # rates of one sweep
RATES = [10 ** (step / 3) for step in range(-16, -4)]  # at which the loss after one update is computed


@dataclass(frozen=True)
class Point:
    """Held-out loss after the last step at one peak rate; None = the run diverged."""

    rate: float
    end: float | None
    seconds: float


@dataclass(frozen=True)
class Cell:
    """One initialization on one data set with one seed. `base`: the held-out loss of the untouched model."""

    method: str
    data: str
    seed: int
    catalogue: float
    base: float
    start: float
    points: Sequence[Point]

    def gain(self, point: Point) -> float:
        """By how much the loss fell below that of the untouched model; -inf if the run diverged."""
        return -math.inf if point.end is None else self.base - point.end


@dataclass(frozen=True)
class Measures:
    """Of one start, on the rows of its first step, in the terms of `benchmarks.rate_first_update`.

    `largest`, `smallest`, `residual`: of the eigenvalues. `line`: the loss on the same rows after one update at each of
    `RATES`. `seconds`: without `line`.
    """

    method: str
    data: str
    seed: int
    slope: float
    curvature: float
    size: float
    gradient_norm: float
    largest: float
    smallest: float
    residual: float
    loss: float
    gradients: int
    line: Sequence[float]
    seconds: float


def next_step(cell: Cell, *, widely: bool) -> int | None:
    """The next rate of a sweep, as a whole number of steps on the grid; None if it is complete.

    The catalogue's rate comes first, then its neighbours, until the best rate has one on either side. `widely`: until
    the outermost rates keep less than `KEPT_GAIN` of the best gain, so that rates beyond them are known to be worse.
    """
    gains = {round(PER_DECADE * math.log10(point.rate)): cell.gain(point) for point in cell.points}
    if not gains:
        return round(PER_DECADE * math.log10(cell.catalogue))
    best = max(gains, key=lambda step: gains[step])
    limit = KEPT_GAIN * gains[best] if widely else gains[best]
    outermost = ((min(gains), -1), (max(gains), 1))
    unfinished = [(gains[end], end + way) for end, way in outermost if gains[end] >= limit]
    return max(unfinished)[1] if unfinished and len(gains) < MOST else None


def write_record(path: Path, record: Cell | Measures) -> None:
    """Write a record to a file; its folder is made if absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(record)))


def read_cell(path: Path) -> Cell:
    """A cell that was written before."""
    found = json.loads(path.read_text())
    return Cell(**{**found, "points": [Point(**point) for point in found["points"]]})


def read_measures(path: Path) -> Measures:
    """Measures that were written before."""
    return Measures(**json.loads(path.read_text()))
