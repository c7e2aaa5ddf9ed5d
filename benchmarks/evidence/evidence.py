"""What was measured, ready for questions: treatments, their ranking, and comparisons of two of them.

All experiments have the same rows, seeds and steps, so a treatment of one can be compared with a treatment of another.
The ranking is the service's own (`api.core.experiments.ranking`).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from api.core.experiments import outcome, words
from api.core.experiments.card import make_card
from api.core.experiments.critical_range import find_critical_range
from api.core.experiments.ranking import Interval, Ranking, Result, Row, rank
from benchmarks.evidence import store
from benchmarks.evidence.plan import STUDIES, Study
from benchmarks.evidence.store import Measured

MIN_SEEDS = 2  # with fewer, nothing is known of the noise
Curve = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Run:
    """One cell that was measured, with the name of its treatment. `cell`: as `store` keeps it."""

    study: str
    name: str
    cell: Mapping[str, Any]

    @property
    def key(self) -> tuple[str, float, int]:
        """Treatment, learning rate and seed."""
        return self.name, self.cell["rate"], self.cell["seed"]

    @cached_property
    def curve(self) -> list[dict[str, Any]]:
        """The validation losses, as the service's ranking takes them."""
        points = zip(self.cell["steps"], self.cell["tokens"], self.cell["losses"], strict=True)
        return [{"step": step, "tokens": tokens, "valid_loss": loss} for step, tokens, loss in points]

    @property
    def loss(self) -> float | None:
        """The best validation loss after training began; None if the run failed."""
        return outcome.find_value(
            {"status": self.cell["status"], "curve": self.curve}, metric="valid_loss", goal="min", at="best"
        )

    def seconds(self, *stages: str) -> float | None:
        """Seconds in these stages; None if the run was interrupted, because only its last attempt is known."""
        if self.cell["status"] != "succeeded" or self.cell["attempts"] != 1:
            return None
        return sum(self.cell["stage_seconds"].get(stage) or 0.0 for stage in stages)


@dataclass(frozen=True)
class Comparison:
    """`other` minus `one`, each at its best rate, by their common seeds: above 0 where `one` is better.

    `interval` holds in 95 % of such comparisons, the choice of the best rates included.
    """

    one: str
    other: str
    seeds: int
    mean: float
    interval: Interval

    @property
    def better(self) -> bool:
        """Whether `one` is better beyond noise."""
        return self.interval.low > 0

    @property
    def worse(self) -> bool:
        """Whether `one` is worse beyond noise."""
        return self.interval.high < 0


class Evidence:
    """Everything that was measured so far."""

    def __init__(self, measured: Mapping[str, Measured], studies: Sequence[Study] = STUDIES) -> None:
        self.measured, self.studies = measured, studies
        self.runs = [
            Run(study.key, study.names[cell["init"]], cell)
            for study in studies
            if study.key in measured
            for cell in measured[study.key].cells
        ]

    @cached_property
    def curves(self) -> dict[tuple[str, float | None, int], Curve]:
        """The curve of each run that succeeded, by treatment, rate and seed."""
        return {run.key: run.curve for run in self.runs if run.cell["status"] == "succeeded"}

    def rank(self, keys: Iterable[str]) -> Ranking:
        """The treatments of these experiments in one ranking."""
        wanted = set(keys)
        return rank([Result(*run.key, run.loss) for run in self.runs if run.study in wanted])

    @cached_property
    def everything(self) -> Ranking:
        """All treatments on the base in full precision."""
        return self.rank(study.key for study in self.studies if "quantization" not in study.lora)

    def find(self, name: str, ranking: Ranking | None = None) -> Row | None:
        """A treatment at its best rate if that is known: two seeds of every rate of its grid have ended."""
        rows = (self.everything if ranking is None else ranking).rows
        row = next((row for row in rows if row.treatment == name), None)
        study = next((study for study in self.studies if name in study.names), None)
        if study is None or row is None or row.summary is None:
            return None
        seeds = [0 if (found := row.by_rate.get(rate)) is None else found.n for rate in study.rates]
        # At some rates a run may diverge; those that ended without a loss are known, too.
        ended = [len({run.cell["seed"] for run in self.runs if run.key[:2] == (name, rate)}) for rate in study.rates]
        return row if max(seeds) >= MIN_SEEDS and min(ended) >= MIN_SEEDS else None

    def compare(self, one: str, other: str, ranking: Ranking | None = None) -> Comparison | None:
        """Two treatments at their best rates; None if one is not known yet."""
        ranking = self.everything if ranking is None else ranking
        first, second = self.find(one, ranking), self.find(other, ranking)
        if first is None or second is None or ranking.noise is None:
            return None
        found = [
            second.values[seed] - first.values[seed] for seed in sorted(first.values.keys() & second.values.keys())
        ]
        if len(found) < MIN_SEEDS:
            return None
        rates = max(len(first.by_rate), len(second.by_rate))
        # As in the service's ranking: the pair's own noise where it is larger, or one of the two is unsteady.
        noise, degrees = max(ranking.noise.deviation, stdev(found) / math.sqrt(2)), ranking.noise.degrees
        if ranking.unsteady & {one, other}:
            noise, degrees = stdev(found) / math.sqrt(2), len(found) - 1
        half = find_critical_range(2, rates, degrees) * noise / math.sqrt(len(found))
        mean = fmean(found)
        return Comparison(one, other, len(found), mean, Interval(mean - half, mean + half))

    def find_share(self, one: str, other: str) -> float | None:
        """The part of `other`'s steps after which `one` has its final loss, each at its best rate; None if it never has
        for some seed."""
        first, second = self.find(one), self.find(other)
        if first is None or second is None:
            return None
        shares = words.find_shares(first, second, self.curves, of="step")
        return fmean(shares) if shares and len(shares) == len(second.values) else None

    def find_start(self, name: str) -> float | None:
        """The mean validation loss before step 1."""
        found = [curve[0]["valid_loss"] for (treatment, _, _), curve in self.curves.items() if treatment == name]
        return fmean(found) if found else None

    def find_seconds(self, name: str, *stages: str) -> float | None:
        """The median over all runs of a treatment that were not interrupted."""
        found = [seconds for run in self.runs if run.name == name and (seconds := run.seconds(*stages)) is not None]
        return median(found) if found else None

    def find_fact(self, name: str, fact: str) -> Any:
        """A number that all runs of a treatment share, such as their parameters; of memory the most."""
        found = [run.cell[fact] for run in self.runs if run.name == name and run.cell.get(fact) is not None]
        return max(found, default=None)

    @property
    def counts(self) -> tuple[int, int]:
        """Cells that were measured, and cells that are planned, added ones included once they are known."""
        return len(self.runs), sum(
            self.measured[study.key].total if study.key in self.measured else study.planned for study in self.studies
        )

    @property
    def differences(self) -> list[str]:
        """What differed between cells although it should not, such as the machine or a version, in sentences."""
        names = {name: name for study in self.studies for name in study.names}
        cells = [
            (run.cell["seed"], run.name, self.measured[run.study].facts[run.cell["facts"]])
            for run in self.runs
            if run.cell["status"] == "succeeded"
        ]
        found = make_card(cells, self.everything, names)
        return [] if found is None else found["warnings"][: len(found["differences"])]

    def is_complete(self, study: Study) -> bool:
        """Whether an experiment has ended and every cell was read."""
        found = self.measured.get(study.key)
        return found is not None and found.status in ("succeeded", "failed") and len(found.cells) == found.total


def load_evidence(folder: Path) -> Evidence:
    """The evidence of a folder of results."""
    return Evidence(store.load_all(folder, [study.key for study in STUDIES]))
