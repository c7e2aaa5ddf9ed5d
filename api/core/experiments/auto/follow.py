"""Keeps a job and the candidates that are tried for it up to date with each other, and hands the best one's run over.

Nothing here commits. `advance` calls `follow` whenever the job or a candidate has changed its status.
"""

from collections.abc import Mapping, Sequence

from sqlalchemy import insert, literal, select
from sqlalchemy.orm import Session

from api.core.db.database import now
from api.core.db.tables import FINAL_STATUSES, Cell, Checkpoint, Experiment, File, Job, Metric
from api.core.experiments import probe
from api.core.experiments.auto.choice import INIT, settle, take_by_rule
from api.core.experiments.experiments import list_rungs
from api.core.jobs import admission, checkpoints, events, pauses
from api.core.jobs import jobs as changes
from lorainit.config.spec import Choice, Lora


def follow(session: Session, experiment: Experiment, cells: Sequence[Cell], jobs: Mapping[str, Job]) -> None:
    """Bring the job that an experiment chooses for, and the candidates, up to date with each other.

    `jobs`: all jobs that belong to the experiment, by id; the one it chooses for is one of them until it is removed.
    """
    if experiment.chooses_for is None or experiment.status == "succeeded":
        return
    open_jobs = [jobs[cell.job_id] for cell in cells if _is_open(jobs.get(cell.job_id))]
    job = jobs.get(experiment.chooses_for)
    if job is None or job.status in FINAL_STATUSES:
        _stop(session, open_jobs, "The job that this one was tried for has ended")
        _end(session, experiment, "cancelled")
    elif job.status == "paused":
        for one in open_jobs:
            pauses.pause(session, one)
    elif admission.has_automatic_init(job):
        _continue_candidates(session, open_jobs)
        _decide(session, experiment, job, cells, jobs, open_jobs)


def _is_open(job: Job | None) -> bool:
    return job is not None and job.status not in FINAL_STATUSES


def _continue_candidates(session: Session, open_jobs: Sequence[Job]) -> None:
    """Resume candidates that were paused together with the job."""
    for one in open_jobs:
        if one.status == "paused" and one.halted_at is None:
            pauses.resume(session, one)


def _decide(
    session: Session,
    experiment: Experiment,
    owner: Job,
    cells: Sequence[Cell],
    jobs: Mapping[str, Job],
    open_jobs: Sequence[Job],
) -> None:
    """Once the last look is taken, let the job (`owner`) go on in place of the best candidate."""
    if (
        len(experiment.decisions) == len(list_rungs(experiment.request))
        and len(open_jobs) == 1
        and open_jobs[0].halted_at is not None
    ):
        best = next(cell for cell in cells if cell.job_id == open_jobs[0].id)
        _adopt(session, experiment, owner, best, open_jobs[0])
        _end(session, experiment, "succeeded")
    elif not open_jobs:
        why, ended = _explain_no_winner(experiment, [jobs[cell.job_id] for cell in cells if cell.job_id in jobs])
        take_by_rule(session, owner, f"no candidate could be chosen, since {why}")
        _end(session, experiment, ended)


def _explain_no_winner(experiment: Experiment, candidates: Sequence[Job]) -> tuple[str, str]:
    """Why no candidate is left, and the status of the experiment."""
    codes = sorted({job.error["code"] for job in candidates if job.error})
    if codes:
        return f"they failed with {', '.join(codes)}", "failed"
    if experiment.decisions:
        return "none had a finite validation loss", "failed"
    return f"experiment {experiment.id} was cancelled", "cancelled"


def _adopt(session: Session, experiment: Experiment, job: Job, cell: Cell, best: Job) -> None:
    """Give the job the initialization, the rate, the numbers and the checkpoint of the best candidate."""
    lora = Lora.model_validate(best.recipe["lora"])
    found = probe.describe_candidates(experiment.request, experiment.decisions)
    method, step = lora.method.method, best.halted_at or 0
    reason = (
        f"best of {len(found)} candidates on the job's rows (experiment {experiment.id}): {probe.list_losses(found)}"
    )
    settle(
        job,
        lora,
        [Choice(param=INIT, value=method, reason=reason)],
        rate=cell.learning_rate,
        reason=f"the best candidate's, in experiment {experiment.id}",
    )
    job.init_report, job.plan = best.init_report, best.plan
    columns = (Metric.step, Metric.created_at, Metric.values)
    copies = select(literal(job.id), literal(0), *columns).where(Metric.job_id == best.id, Metric.step <= step)
    session.execute(insert(Metric).from_select(["job_id", "lease_token", *(one.key for one in columns)], copies))
    for row in session.scalars(select(Checkpoint).where(Checkpoint.job_id == best.id, Checkpoint.deleted_at.is_(None))):
        row.job_id, row.name = job.id, checkpoints.checkpoint_name(job, row.step)
        session.get_one(File, row.file_id).filename = f"{job.id}-step-{row.step}.tar"
    cell.stopped_at = step
    changes.cancel_open(session, best, f"Job {job.id} goes on from here, with this job's checkpoint")
    others = sum(one["steps"] for one in found[1:])
    message = (
        f"Initialization chosen: {method} at learning rate {cell.learning_rate:g}. {probe.list_losses(found)}."
        f" The job goes on from step {step}; the other candidates cost {others} steps"
    )
    data = {"kind": "init_choice", "experiment_id": experiment.id, "candidates": found, "steps": others}
    events.append(session, job.id, message, at=now(session), data=data)
    session.flush()


def _stop(session: Session, jobs: Sequence[Job], text: str) -> None:
    for job in jobs:
        changes.cancel_open(session, job, text)


def _end(session: Session, experiment: Experiment, status: str) -> None:
    """End the experiment, unless somebody has cancelled it or it has ended before."""
    if experiment.finished_at is None:
        experiment.status, experiment.finished_at = status, now(session)
        session.flush()
