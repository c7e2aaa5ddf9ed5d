"""Brings experiments up to date after one of their jobs has changed its status. Nothing here commits.

The reconciler calls `advance` for each experiment that `find_due` names. It can be called at any time and any number of
times: everything it does follows from the rows, so a crash between two calls loses nothing.
"""

from collections.abc import Mapping, Sequence

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from api.core.db.database import now
from api.core.db.tables import FINAL_STATUSES, Cell, Experiment, Job
from api.core.experiments import experiments, growth, outcome, rungs
from api.core.experiments.auto.follow import follow
from api.core.jobs import pauses


def find_due(session: Session, *, limit: int = 100) -> Sequence[str]:
    """Ids of experiments with a job whose status has changed."""
    due = select(Job.experiment_id).where(Job.experiment_due.is_not(None)).distinct()
    return [found for found in session.scalars(due.limit(limit)) if found is not None]


def advance(session: Session, experiment_id: str) -> bool:
    """Store what came of jobs that ended, let waiting ones start, and end the experiment when all jobs have ended.

    Returns:
        False if the experiment is gone.
    """
    experiment = experiments.lock(session, experiment_id)
    # Before the jobs are read: a job that changes its status after this marks itself again.
    mine = (
        update(Job)
        .where(Job.experiment_id == experiment_id, Job.experiment_due.is_not(None))
        .values(experiment_due=None)
    )
    session.execute(mine.execution_options(synchronize_session=False))
    if experiment is None:
        return False
    cells = experiments.read_cells(session, experiment_id)
    jobs = _read_jobs(session, experiment_id)
    for cell in cells:
        _store_outcome(session, cell, jobs.get(cell.job_id))
    _release_waiting(session, experiment, cells, jobs)
    rungs.decide(session, experiment, cells, jobs)
    follow(session, experiment, cells, jobs)
    if not growth.grow(session, experiment, cells, jobs):
        _write_status(session, experiment, cells, jobs)
    session.flush()
    return True


def _read_jobs(session: Session, experiment_id: str) -> dict[str, Job]:
    rows = session.scalars(
        select(Job).where(Job.experiment_id == experiment_id).execution_options(populate_existing=True)
    )
    return {job.id: job for job in rows}


def _store_outcome(session: Session, cell: Cell, job: Job | None) -> None:
    """Keep what an ended job showed. A job that was resumed after its end has no outcome again until its next end."""
    if job is None:
        return
    if job.status not in FINAL_STATUSES:
        cell.outcome = None
    elif cell.outcome is None or cell.outcome["lease_token"] != job.lease_token:
        cell.outcome = {**outcome.read_outcome(session, job), "lease_token": job.lease_token}


def _release_waiting(session: Session, experiment: Experiment, cells: Sequence[Cell], jobs: Mapping[str, Job]) -> None:
    """Let as many waiting jobs start as others have ended, in the order of the grid."""
    if experiment.finished_at is not None or experiment.max_parallel is None:
        return
    open_ones = [cell for cell in cells if cell.released and _is_busy(jobs.get(cell.job_id))]
    waiting = [cell for cell in cells if not cell.released]
    for cell in waiting[: max(0, experiment.max_parallel - len(open_ones))]:
        cell.released = True
        job = jobs.get(cell.job_id)
        if job is not None and job.status == "paused":  # somebody may have cancelled or resumed it by hand
            pauses.resume(session, job)


def _is_busy(job: Job | None) -> bool:
    """Whether a job still runs or will; one that waits at a rung leaves its place to others."""
    return job is not None and job.status not in FINAL_STATUSES and job.halted_at is None


def _write_status(session: Session, experiment: Experiment, cells: Sequence[Cell], jobs: Mapping[str, Job]) -> None:
    """`succeeded` once all jobs have ended and one has succeeded. A cancelled experiment stays cancelled.

    An experiment that chooses for a job ends with the choice (`follow`).
    """
    if experiment.status == "cancelled" or (experiment.chooses_for and experiment.finished_at is not None):
        return
    statuses = [
        jobs[cell.job_id].status if cell.job_id in jobs else (cell.outcome or {}).get("status") for cell in cells
    ]
    if all(status is None or status in FINAL_STATUSES for status in statuses):
        ended = "succeeded" if "succeeded" in statuses else "failed" if "failed" in statuses else "cancelled"
        if experiment.status != ended:
            experiment.status, experiment.finished_at = ended, now(session)
        return
    started = any(job.started_at is not None for job in jobs.values())
    experiment.status, experiment.finished_at = "running" if started else "queued", None
