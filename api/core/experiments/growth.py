"""Cells that are added to a running experiment: rates beyond the edge of the grid, and fresh seeds for the leaders.

A new cell's job is a copy of a job of the same treatment with another rate or seed, so that everything else is equal.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal, cast

from sqlalchemy.orm import Session

from api.core.db.tables import FINAL_STATUSES, Cell, Experiment, Job
from api.core.experiments.experiments import Treatment
from api.core.experiments.grid import GridCell, list_cells
from api.core.experiments.ranking import Row
from api.core.experiments.results import Results
from api.core.jobs.submit import submit_copy
from lorainit.config.spec import HIGHEST_RATE, LOWEST_RATE

Phase = Literal["grid", "extension", "confirmation"]
STEP = 3.0  # from a single rate to the next one; otherwise the grid's own step is taken


def grow(session: Session, experiment: Experiment, cells: Sequence[Cell], jobs_by_id: dict[str, Job]) -> bool:
    """Once all jobs have ended, add the cells that the request asks for; True if some were added.

    The grid is extended first, as often as a best rate lies at its edge and the budget allows. Then the leaders are
    run on fresh seeds, once.
    """
    if experiment.finished_at is not None or any(not _has_ended(cell, jobs_by_id) for cell in cells):
        return False
    found = Results(experiment, cells)
    wanted = list(_extend(found)) or list(_confirm(found))
    first = max(cell.number for cell in cells) + 1
    added = [
        _add(session, found, cell, phase, number, jobs_by_id)
        for number, (phase, cell) in enumerate(wanted, start=first)
    ]
    return any(added)


def _has_ended(cell: Cell, jobs_by_id: dict[str, Job]) -> bool:
    job = jobs_by_id.get(cell.job_id)
    return cell.outcome is not None and (job is None or job.status in FINAL_STATUSES)


def _extend(found: Results) -> Iterator[tuple[Phase, GridCell]]:
    request = found.experiment.request
    jobs_left = request["max_jobs"] - len(found.cells)
    for row in found.ranking.rows if request["extend"] else ():
        rate = _find_rate_beyond(row)
        if rate is None or len(request["grid"]["seeds"]) > jobs_left:
            continue
        jobs_left -= len(request["grid"]["seeds"])
        yield from (("extension", cell) for cell in _make_cells(found, row, rate, request["grid"]["seeds"]))


def _find_rate_beyond(row: Row) -> float | None:
    """The next rate beyond the edge at which a treatment's best one lies; None if it lies inside."""
    if not row.at_edge or row.summary is None or row.learning_rate is None:
        return None
    rates = sorted(row.by_rate)
    if len(rates) == 1:
        return _within(rates[0] * STEP, rates)
    lowest = row.learning_rate == rates[0]
    step = rates[0] / rates[1] if lowest else rates[-1] / rates[-2]
    return _within(row.learning_rate * step, rates)


def _within(rate: float, rates: Sequence[float]) -> float | None:
    rounded = float(f"{rate:.2e}")
    return rounded if LOWEST_RATE <= rounded <= HIGHEST_RATE and rounded not in rates else None


def _confirm(found: Results) -> Iterator[tuple[Phase, GridCell]]:
    """Fresh seeds for what is tied with the best, and for the baseline."""
    request = found.experiment.request
    if not request["confirm_seeds"] or any(cell.phase == "confirmation" for cell in found.cells):
        return
    first = max(request["grid"]["seeds"]) + 1
    fresh = [(first + number) % 2**31 for number in range(request["confirm_seeds"])]
    rows = [row for row in found.ranking.rows if row.summary is not None and row.learning_rate is not None]
    for row in rows:
        if row.tied_with_best or row.treatment == found.baseline:
            assert row.learning_rate is not None
            yield from (("confirmation", cell) for cell in _make_cells(found, row, row.learning_rate, fresh))


def _make_cells(found: Results, row: Row, rate: float, seeds: Sequence[int]) -> list[GridCell]:
    init, rank = cast(Treatment, row.treatment)
    grid = found.experiment.request["grid"]
    rates = [[rate] if index == init else [] for index in range(len(grid["init"]))]
    cells = list_cells(grid["init"], ranks=[rank], rates=rates, seeds=seeds)
    if len(grid["ranks"]) == 1:
        return cells
    return [replace(cell, name=cell.name.replace("/", f"/r{rank}/", 1)) for cell in cells]


def _add(
    session: Session, found: Results, cell: GridCell, phase: Phase, number: int, jobs_by_id: dict[str, Job]
) -> bool:
    """Make the job of a new cell; False if no job of its treatment is left to copy."""
    treatment = (cell.init, cell.rank)
    like = next(
        (
            jobs_by_id[one.job_id]
            for one in found.cells
            if (one.init, one.rank) == treatment and one.job_id in jobs_by_id
        ),
        None,
    )
    if like is None:
        return False
    experiment = found.experiment
    job = submit_copy(session, like, seed=cell.seed, learning_rate=cell.learning_rate, labels={"cell": cell.name})
    session.add(
        Cell(
            experiment_id=experiment.id, number=number, job_id=job.id, name=cell.name, init=cell.init, rank=cell.rank,
            learning_rate=cell.learning_rate, seed=cell.seed, phase=phase, released=True, stopped_at=None, outcome=None,
        )
    )  # fmt: skip
    return True
