"""Experiments: create, find, list, cancel and delete. Nothing here commits.

An experiment is a set of ordinary jobs. `advance` moves it on whenever one of them has changed its status.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from sqlalchemy import delete as sql_delete
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from api.core.db import paging
from api.core.db.database import now
from api.core.db.tables import FINAL_STATUSES, Cell, Experiment, Job
from api.core.errors import InvalidValue, NotFound, Refusal, WrongState
from api.core.experiments import halving
from api.core.experiments.grid import MAX_CELLS, GridCell, list_cells
from api.core.experiments.power import describe_plan
from api.core.ids import new_id
from api.core.jobs import jobs
from api.core.jobs.submit import Order, submit, submit_copy
from api.core.jobs.transitions import change_status, job_with_status
from api.core.models import catalogue
from api.core.queue import scheduling
from lorainit.config.resolve import base_learning_rate
from lorainit.config.spec import BaseModelRef, Lora

Schedule = Literal["full", "halving"]
ShownSchedule = Literal["full", "halving", "probe"]
Treatment = tuple[int, int]  # the place of an initialization in the grid, and a rank
OWN_LABELS = ("experiment_id", "cell")  # the metadata that each job of an experiment gets
# The rates of a grid that asks for none: within a factor of 3 of the usual one, where tuned rates were found so far.
AUTO_FACTORS = (1 / 3, 1.0, 3.0)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """That an experiment chooses the initialization of a job (`api.core.experiments.auto`).

    `looks`: the shares of the job's steps after which candidates are compared. `text`: what is tried, as a sentence.
    """

    job_id: str
    looks: Sequence[float]
    text: str


@dataclass(frozen=True, kw_only=True)
class ExperimentOrder:
    """What a caller asks for. Its types and ranges are checked already.

    `job`: the order that all cells share; `given`: the same as the caller wrote it. `loras`: the adapter of each
    treatment. `inits`: the initializations as they are shown. `rates`: of each initialization; None = around the rate
    that the catalogue has for it. `extend`: add rates where a best one lies at the edge, up to `max_jobs` jobs.
    `confirm_seeds`: on how many fresh seeds the leaders are run in the end. `probe`: for which job an initialization is
    chosen by this experiment, if for one.
    """

    name: str
    job: Order
    given: Mapping[str, Any]
    loras: Mapping[Treatment, Lora]
    inits: Sequence[dict[str, Any]]
    ranks: Sequence[int]
    rates: Sequence[Sequence[float]] | None
    seeds: Sequence[int]
    objective: Mapping[str, str]
    schedule: ShownSchedule
    extend: bool
    max_jobs: int
    confirm_seeds: int
    metadata: dict[str, str] | None
    max_parallel: int | None
    probe: Probe | None = None


def create(session: Session, project_id: str, order: ExperimentOrder) -> Experiment:
    """A new experiment and all its jobs, or none of them.

    Raises:
        Refusal: a cell could never run, or the jobs are too many. It names the cell and the field of `job`.
    """
    cells = _lay_out(order)
    if len(cells) > min(MAX_CELLS, order.max_jobs):
        most = f"max_jobs, {order.max_jobs}" if order.max_jobs < MAX_CELLS else f"an experiment may have, {MAX_CELLS}"
        text = f"grid: {len(cells)} jobs are more than {most}."
        raise InvalidValue(text, code="invalid_value", param="grid")
    if order.schedule == "halving" and len(cells) < halving.MIN_CELLS * len(order.seeds):
        text = f"schedule 'halving' needs at least {halving.MIN_CELLS} cells of each seed: use 'full'."
        raise InvalidValue(text, code="invalid_value", param="schedule")
    request = _make_request(order)  # before the lock, because computing the plan may take a second or two
    if order.probe is None:  # otherwise the job that it is for has been counted
        scheduling.require_queue_quota(session, project_id, adding=len(cells))
    experiment = Experiment(
        id=new_id("exp_"),
        project_id=project_id,
        created_at=now(session),
        finished_at=None,
        status="queued",
        name=order.name,
        labels=order.metadata,
        request=request,
        max_parallel=order.max_parallel,
        decisions=[],
    )
    session.add(experiment)
    session.flush()
    first_jobs: dict[Treatment, Job] = {}
    for cell in cells:
        # The checks of a job cost several queries, and cells of one treatment differ in nothing that is checked.
        first = first_jobs.get((cell.init, cell.rank))
        job = _submit(session, experiment, cell, order, like=first)
        first_jobs.setdefault((cell.init, cell.rank), job)
        released = order.max_parallel is None or cell.number < order.max_parallel
        if not released:
            _hold(session, job, experiment)
        session.add(
            Cell(
                experiment_id=experiment.id,
                number=cell.number,
                job_id=job.id,
                name=cell.name,
                init=cell.init,
                rank=cell.rank,
                learning_rate=cell.learning_rate,
                seed=cell.seed,
                phase="grid",
                released=released,
                stopped_at=None,
                outcome=None,
            )
        )
    session.flush()
    return experiment


def _lay_out(order: ExperimentOrder) -> list[GridCell]:
    try:
        model = catalogue.require(order.job.model).reference()
    except Refusal as refusal:
        raise type(refusal)(refusal.message, code=refusal.code, param=f"job.{refusal.param}") from refusal
    first = order.ranks[0]
    rates = order.rates or [
        [choose_rate(_find_usual_rate(model, order.loras[init, first]), factor) for factor in AUTO_FACTORS]
        for init in range(len(order.inits))
    ]
    return list_cells(order.inits, ranks=order.ranks, rates=rates, seeds=order.seeds)


def _find_usual_rate(model: BaseModelRef, lora: Lora) -> float:
    return base_learning_rate(model, lora.resolve()[0].method)


def choose_rate(usual: float, factor: float) -> float:
    """A rate near the usual one of an initialization, rounded to two digits as the usual one is."""
    return float(f"{usual * factor:.1e}")


def _make_request(order: ExperimentOrder) -> dict[str, Any]:
    """What is shown of the request, with what the experiment will be able to find."""
    first = None if order.rates is None else list(order.rates[0])
    same = order.rates is not None and all(list(rates) == first for rates in order.rates)
    rates = first if same else "auto"
    plan = (
        order.probe.text
        if order.probe
        else describe_plan(treatments=len(order.loras), rates=len(first or AUTO_FACTORS), seeds=len(order.seeds))
    )
    grid = {"init": list(order.inits), "learning_rates": rates, "seeds": list(order.seeds), "ranks": list(order.ranks)}
    return {
        "plan": plan, "job": dict(order.given), "grid": grid, "objective": dict(order.objective),
        "schedule": order.schedule, "extend": order.extend, "max_jobs": order.max_jobs,
        "confirm_seeds": order.confirm_seeds,
        "probe": None if order.probe is None else {"job_id": order.probe.job_id, "looks": list(order.probe.looks)},
    }  # fmt: skip


def list_rungs(request: Mapping[str, Any]) -> Sequence[float]:
    """The shares of the steps at which the cells of an experiment wait to be compared, in order."""
    if request.get("probe"):
        looks: Sequence[float] = request["probe"]["looks"]
        return looks
    return halving.RUNGS if request["schedule"] == "halving" else ()


def _submit(
    session: Session, experiment: Experiment, cell: GridCell, order: ExperimentOrder, *, like: Job | None
) -> Job:
    """The job of a cell: a copy of `like`, a job of the same treatment, or the first one, which is checked.

    Raises:
        Refusal: it could never run.
    """
    stop_after = next(iter(list_rungs(experiment.request)), None)
    if like is not None:
        return submit_copy(
            session,
            like,
            seed=cell.seed,
            learning_rate=cell.learning_rate,
            labels={"cell": cell.name},
            stop_after=stop_after,
        )
    labels = {**(order.job.metadata or {}), "experiment_id": experiment.id, "cell": cell.name}
    job = replace(
        order.job,
        metadata=labels,
        seed=cell.seed,
        lora=order.loras[cell.init, cell.rank],
        training=order.job.training.model_copy(update={"learning_rate": cell.learning_rate}),
    )
    try:
        return submit(session, experiment.project_id, job, experiment_id=experiment.id, stop_after=stop_after)
    except Refusal as refusal:
        raise _name_cell(refusal, cell) from refusal


def _name_cell(refusal: Refusal, cell: GridCell) -> Refusal:
    """The same refusal, for a caller who sent a grid and not this job."""
    init, field = f"grid.init[{cell.init}]", refusal.param or ""
    param = field.replace("lora.init", init, 1) if field.startswith("lora.init") else f"job.{field}".rstrip(".")
    return type(refusal)(f"Cell {cell.name} could not run: {refusal.message}", code=refusal.code, param=param)


def _hold(session: Session, job: Job, experiment: Experiment) -> None:
    """Pause a new job until other jobs of the experiment have ended."""
    message = f"The job waits: experiment {experiment.id} runs at most {experiment.max_parallel} jobs at once"
    change_status(session, job_with_status(job.id, "validating_files"), "paused", message)


def find(session: Session, project_id: str, experiment_id: str) -> Experiment:
    """An experiment of this project.

    Raises:
        NotFound: there is none with this id.
    """
    experiment = session.get(Experiment, experiment_id) if "\x00" not in experiment_id else None
    if experiment is None or experiment.project_id != project_id:
        raise unknown_experiment(experiment_id)
    return experiment


def unknown_experiment(experiment_id: str) -> NotFound:
    """The error for an experiment that does not exist."""
    return NotFound(f"Could not find experiment: {experiment_id}", code="experiment_not_found", param="experiment_id")


def page(session: Session, project_id: str, *, after: str | None, limit: int) -> tuple[Sequence[Experiment], bool]:
    """Newest first, `limit` of them after the experiment `after`; True when there are more."""
    query = select(Experiment).where(Experiment.project_id == project_id)
    return paging.read_page(session, query, Experiment, project_id=project_id, after=after, limit=limit)


def lock(session: Session, experiment_id: str) -> Experiment | None:
    """The experiment, locked against other changes of its status; None if it is gone.

    Whoever locks an experiment and its jobs locks the experiment first, so that two of them never wait for each other.
    """
    wanted = select(Experiment).where(Experiment.id == experiment_id).with_for_update()
    return session.scalar(wanted.execution_options(populate_existing=True))


def read_cells(session: Session, experiment_id: str) -> Sequence[Cell]:
    """The cells in the order of the grid."""
    return session.scalars(select(Cell).where(Cell.experiment_id == experiment_id).order_by(Cell.number)).all()


def count_statuses(session: Session, experiment_ids: Sequence[str]) -> dict[str, dict[str, int]]:
    """For each experiment: how many of its jobs have each status. Jobs that were removed are counted by outcome."""
    found: dict[str, dict[str, int]] = {one: {} for one in experiment_ids}
    status = func.coalesce(Job.status, Cell.outcome["status"].as_string(), "cancelled")
    rows = session.execute(
        select(Cell.experiment_id, status, func.count())
        .outerjoin(Job, Job.id == Cell.job_id)
        .where(Cell.experiment_id.in_(experiment_ids))
        .group_by(Cell.experiment_id, status)
    )
    for experiment_id, name, count in rows:
        found[experiment_id][name] = count
    return found


def cancel(session: Session, experiment: Experiment) -> Experiment:
    """Cancel all jobs that have not ended. Cancelling a cancelled experiment changes nothing.

    Raises:
        WrongState: the experiment has already succeeded or failed.
    """
    locked = lock(session, experiment.id)
    if locked is None:
        raise unknown_experiment(experiment.id)
    if locked.status in ("succeeded", "failed"):
        raise WrongState(
            f"Experiment {locked.id} has already {locked.status}; it can no longer be cancelled.",
            code="invalid_job_state",
        )
    for job in _list_open_jobs(session, locked.id):
        jobs.cancel_open(session, job)
    if locked.status != "cancelled":
        locked.status, locked.finished_at = "cancelled", now(session)
    session.flush()
    return locked


def _list_open_jobs(session: Session, experiment_id: str) -> Sequence[Job]:
    # In the order of their ids, so that two transactions that lock several of them do not wait for each other.
    cells = select(Cell.job_id).where(Cell.experiment_id == experiment_id)  # not the job that a probe is for
    wanted = select(Job).where(Job.id.in_(cells), Job.status.not_in(FINAL_STATUSES)).order_by(Job.id)
    return session.scalars(wanted.with_for_update().execution_options(populate_existing=True)).all()


def delete(session: Session, experiment: Experiment) -> None:
    """Remove the experiment and its table. Its jobs and their adapters stay; they belong to no experiment then.

    Raises:
        WrongState: it has not ended.
    """
    locked = lock(session, experiment.id)
    if locked is None:
        raise unknown_experiment(experiment.id)
    if locked.finished_at is None:
        raise WrongState(f"Experiment {locked.id} has not ended: cancel it first.", code="invalid_job_state")
    mine = update(Job).where(Job.experiment_id == locked.id).values(experiment_id=None, experiment_due=None)
    session.execute(mine.execution_options(synchronize_session=False))
    session.execute(sql_delete(Cell).where(Cell.experiment_id == locked.id))
    session.delete(locked)
    session.flush()
