"""The results of an experiment: its ranking with costs, its comparison card, and what they mean in words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any, cast

from api.core.db.tables import Cell, Experiment
from api.core.experiments import budgets, card, outcome, probe, words
from api.core.experiments.experiments import Treatment
from api.core.experiments.grid import name_inits
from api.core.experiments.ranking import Ranking, Result, Row, rank

COSTS = ("init_seconds", "train_seconds", "gpu_seconds", "peak_memory_bytes")
SIZES = ("trainable_parameters", "export_rank", "adapter_bytes")


@dataclass(frozen=True)
class Results:
    """What is known of an experiment so far, from the cells that have ended."""

    experiment: Experiment
    cells: Sequence[Cell]
    confirms: bool = False  # whether `cells` are those of the confirmation

    @cached_property
    def ranking(self) -> Ranking:
        """The treatments of which a cell has ended, the best first."""
        objective = self.experiment.request["objective"]
        found = [
            Result(
                _treatment(cell),
                cell.learning_rate,
                cell.seed,
                outcome.find_value(
                    cell.outcome, metric=objective["metric"], goal=objective["goal"], at=objective["at"]
                ),
                stopped=cell.stopped_at is not None,
            )
            for cell in self.ended
            if self.confirms or cell.phase != "confirmation"
        ]
        return rank(found, goal=objective["goal"])

    @cached_property
    def confirmation(self) -> "Results | None":
        """The same for the leaders on fresh seeds; None if they were not run."""
        fresh = [cell for cell in self.cells if cell.phase == "confirmation"]
        return Results(self.experiment, fresh, confirms=True) if fresh and not self.confirms else None

    @cached_property
    def ended(self) -> list[Cell]:
        """The cells whose job has ended."""
        return [cell for cell in self.cells if cell.outcome is not None]

    @cached_property
    def names(self) -> dict[Treatment, str]:
        """A name for each treatment; the rank is part of it only if the grid has several."""
        grid = self.experiment.request["grid"]
        names, several = name_inits(grid["init"]), len(grid["ranks"]) > 1
        return {_treatment(cell): names[cell.init] + (f" r{cell.rank}" if several else "") for cell in self.cells}

    @cached_property
    def curves(self) -> dict[tuple[Any, float | None, int], Sequence[Mapping[str, Any]]]:
        """The validation curve of each cell that has succeeded, or was stopped by the schedule."""
        return {
            (_treatment(cell), cell.learning_rate, cell.seed): cell.outcome["curve"]
            for cell in self.cells
            if cell.outcome is not None and (cell.outcome["status"] == "succeeded" or cell.stopped_at is not None)
        }

    @cached_property
    def baseline(self) -> Treatment:
        """What others are compared with for speed: `kaiming` if it is in the grid, otherwise its first entry."""
        grid = self.experiment.request["grid"]
        plain = (index for index, init in enumerate(grid["init"]) if init["method"] == words.BASELINE)
        return next(plain, 0), grid["ranks"][0]

    @property
    def summary(self) -> list[str]:
        """What the results mean, in sentences."""
        if self.experiment.chooses_for:
            return [probe.list_losses(probe.describe_candidates(self.experiment.request, self.experiment.decisions))]
        return words.describe(self.ranking, names=self.names, curves=self.curves, baseline=self.baseline)

    @property
    def card(self) -> dict[str, Any] | None:
        """The comparison card."""
        found = [
            (cell.seed, cell.name, cell.outcome["same"])
            for cell in self.ended
            if cell.outcome is not None and cell.outcome["status"] == "succeeded"
        ]
        has_ended = self.experiment.finished_at is not None
        return card.make_card(found, self.ranking, self.names, has_ended=has_ended)

    def list_chosen(self, row: Row) -> list[Cell]:
        """The cells of a treatment at its best rate, in the order of the seeds in the grid."""
        cells = [cell for cell in self.cells if self.confirms or cell.phase != "confirmation"]
        return [cell for cell in cells if (_treatment(cell), cell.learning_rate) == _key(row)]

    def find_stop(self, row: Row) -> int | None:
        """The last step that a treatment reached if the schedule stopped all its cells; None if one went to its end."""
        mine = [cell for cell in self.cells if _treatment(cell) == row.treatment]
        steps = [cell.stopped_at for cell in mine if cell.stopped_at is not None]
        return max(steps) if len(steps) == len(mine) else None

    def find_cost(self, row: Row) -> dict[str, float | None]:
        """The mean cost of a treatment's runs at its best rate; of memory the most."""
        found = [cell.outcome for cell in self.list_chosen(row) if cell.outcome is not None]
        means = {name: _mean([one[name] for one in found]) for name in COSTS}
        peaks = [one["peak_memory_bytes"] for one in found if one["peak_memory_bytes"] is not None]
        return {**means, "peak_memory_bytes": max(peaks, default=None)}

    def find_sizes(self, row: Row) -> dict[str, int | None]:
        """Trained parameters, rank and size of the download of a treatment."""
        found = [cell.outcome for cell in self.list_chosen(row) if cell.outcome is not None]
        return {name: next((one[name] for one in found if one[name] is not None), None) for name in SIZES}

    def find_speed(self, row: Row) -> dict[str, float | None]:
        """The part of the baseline's steps, tokens and seconds after which its final loss is reached; means over seeds.

        None where not every seed reaches it. What the initialization cost counts.
        """
        start = next((one for one in self.ranking.rows if one.treatment == self.baseline), None)
        if start is None or start.summary is None or row.summary is None:
            return dict.fromkeys(budgets.BUDGETS)
        found = {}
        for name, of in budgets.BUDGETS.items():
            shares = words.find_shares(row, start, self.curves_with_start, of=of)
            found[name] = fmean(shares) if shares and len(shares) == len(start.values) else None
        return found

    @cached_property
    def curves_with_start(self) -> dict[tuple[Any, float | None, int], Sequence[Mapping[str, Any]]]:
        """As `curves`, with what the initialization cost before training (`budgets`)."""
        found: dict[tuple[Any, float | None, int], Mapping[str, Any]] = {
            (_treatment(cell), cell.learning_rate, cell.seed): cell.outcome or {} for cell in self.cells
        }
        return {
            key: budgets.count_start(
                curve, batches=found[key].get("start_batches") or 0, seconds=found[key].get("init_seconds") or 0.0
            )
            for key, curve in self.curves.items()
        }

    @cached_property
    def equal_budgets(self) -> dict[str, float | None]:
        """The steps, tokens and seconds that every row's runs had, initialization included."""
        chosen = [curve for row in self.ranking.rows for curve in self._list_curves(row)]
        return {name: budgets.find_limit(chosen, of=of) for name, of in budgets.BUDGETS.items()}

    def find_losses(self, row: Row) -> dict[str, float | None]:
        """Mean validation losses of a row at its best rate: the last, the best, and those at equal budgets.

        None where a seed has none.
        """
        curves = self._list_curves(row)
        last = [curve[-1]["valid_loss"] for curve in curves if curve]
        best = [min((point["valid_loss"] for point in curve[1:]), default=None) for curve in curves]
        equal = {
            name: [budgets.find_loss(curve, at=limit, of=budgets.BUDGETS[name]) for curve in curves]
            for name, limit in self.equal_budgets.items()
            if limit is not None
        }
        found = {"final": last, "best": best, **{f"at_equal_{name}": losses for name, losses in equal.items()}}
        return {name: None if None in losses else _mean(losses) for name, losses in found.items()}

    def _list_curves(self, row: Row) -> list[Sequence[Mapping[str, Any]]]:
        """The curves of a row's runs at its best rate that went to their end, initialization included."""
        keys = [(row.treatment, row.learning_rate, seed) for seed in row.values]
        return [self.curves_with_start[key] for key in keys if key in self.curves_with_start]


def _treatment(cell: Cell) -> Treatment:
    return cell.init, cell.rank


def _key(row: Row) -> tuple[Treatment, float | None]:
    return cast(Treatment, row.treatment), row.learning_rate


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
