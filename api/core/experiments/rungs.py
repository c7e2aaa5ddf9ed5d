"""Carries out what `halving` or `probe` decides: at a rung, some jobs of an experiment go on, others are cancelled."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from api.core.db.tables import FINAL_STATUSES, Cell, Experiment, Job, Metric
from api.core.experiments import probe
from api.core.experiments.experiments import Treatment, list_rungs
from api.core.experiments.halving import Standing, choose_survivors
from api.core.jobs import jobs as changes
from api.core.jobs import pauses

Key = tuple[Treatment, float]


def decide(session: Session, experiment: Experiment, cells: Sequence[Cell], jobs: Mapping[str, Job]) -> None:
    """Once every job that has not ended waits at the rung, let the best go on and cancel the others.

    Each decision is kept with its numbers in `experiment.decisions`. Who is the best at the last rung of a probe stays
    paused, because the job that the probe is for goes on in its place (`api.core.experiments.auto`).
    """
    rungs, passed = list_rungs(experiment.request), len(experiment.decisions)
    next_rung = rungs[passed + 1] if passed + 1 < len(rungs) else None
    if experiment.finished_at is not None or passed >= len(rungs):
        return
    if any(not cell.released for cell in cells):
        return
    open_cells = [cell for cell in cells if cell.job_id in jobs and jobs[cell.job_id].status not in FINAL_STATUSES]
    if not open_cells or any(jobs[cell.job_id].halted_at is None for cell in open_cells):
        return
    standings = _read_standings(session, experiment, open_cells, jobs)
    survivors = _choose_survivors(experiment, list(standings.values()), is_last=next_rung is None)
    kept = {(one.treatment, one.learning_rate) for one in survivors}
    record = [
        {
            "treatment": list(key[0]),
            "learning_rate": key[1],
            "mean": standing.mean if standing.losses else None,
            "seeds": len(standing.losses),
            "kept": key in kept,
        }
        for key, standing in sorted(standings.items(), key=lambda item: item[1].mean)
    ]
    steps = [jobs[cell.job_id].halted_at or 0 for cell in open_cells]
    experiment.decisions = [*experiment.decisions, {"rung": rungs[passed], "step": max(steps), "cells": record}]
    for cell in open_cells:
        job = jobs[cell.job_id]
        if _key(cell) in kept:
            if next_rung is not None or not experiment.chooses_for:
                pauses.resume(session, job, stop_after=next_rung)
        else:
            cell.stopped_at = job.halted_at
            text = f"Stopped after step {job.halted_at} by its experiment's schedule: other cells have better results"
            changes.cancel_open(session, job, text)


def _choose_survivors(experiment: Experiment, standings: list[Standing], *, is_last: bool) -> list[Standing]:
    if not experiment.chooses_for:
        return choose_survivors(standings)
    return probe.sort_candidates(standings)[: 1 if is_last else probe.LEFT]


def _read_standings(
    session: Session, experiment: Experiment, cells: Sequence[Cell], jobs: Mapping[str, Job]
) -> dict[Key, Standing]:
    """Where each cell stands, with the losses of its seeds at the step at which they were halted."""
    metric, sign = experiment.request["objective"]["metric"], _sign(experiment)
    found: dict[Key, dict[int, float]] = {}
    for cell in cells:
        losses = found.setdefault(_key(cell), {})
        job = jobs[cell.job_id]
        at = select(Metric.values).where(Metric.job_id == job.id, Metric.step == job.halted_at)
        values: dict[str, Any] = session.scalar(at) or {}
        if values.get(metric) is not None:
            losses[cell.seed] = sign * values[metric]
    return {key: Standing(key[0], key[1], losses) for key, losses in found.items()}


def _sign(experiment: Experiment) -> float:
    return 1.0 if experiment.request["objective"]["goal"] == "min" else -1.0


def _key(cell: Cell) -> Key:
    return (cell.init, cell.rank), cell.learning_rate
