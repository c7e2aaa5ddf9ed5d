"""Estimates how long a run will take, from the last run of its project with the same base model and initialization.

There is no better source before the first step, because loading and initializing depend on the disk and the method,
and a step on the machine. A run that resumes from a checkpoint gives no estimate and gets none, because its times are
those of a part of the job.
"""

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from api.core.db.tables import Job

TRAINING = (
    "training",
    "evaluating",
)  # scale with the trained tokens; the other stages are expected to take as long as before
_LOOKED_AT = 20  # of the project's last successes on the base; older ones say little about the machine of today


def estimate_seconds(session: Session, job_id: str, plan: dict[str, Any]) -> float | None:
    """From the claim to the end of a job with this plan; None where no run like it is known."""
    job = session.get_one(Job, job_id)
    like = (Job.project_id == job.project_id, Job.model == job.model, Job.queue == job.queue, Job.lease_token == 1)
    last = select(Job.recipe, Job.plan, Job.progress).where(*like, Job.status == "succeeded")
    rows = (
        session.execute(last.order_by(Job.finished_at.desc()).limit(_LOOKED_AT)).all() if job.lease_token == 1 else []
    )
    alike = [row for row in rows if _method(row.recipe) == _method(job.recipe)]
    found = (_scaled(row.plan, row.progress, tokens=_tokens(plan)) for row in alike)
    return next((seconds for seconds in found if seconds is not None), None)


def _scaled(plan: dict[str, Any] | None, progress: dict[str, Any] | None, *, tokens: float) -> float | None:
    """The duration of a run, scaled to so many trained tokens."""
    seconds = (progress or {}).get("stage_seconds") or {}
    training = sum(seconds.get(stage, 0.0) for stage in TRAINING)
    if not plan or not training or not _tokens(plan):
        return None
    return float(sum(seconds.values()) - training + training * tokens / _tokens(plan))


def _tokens(plan: dict[str, Any]) -> float:
    """Trained tokens of all epochs."""
    return float(plan["trained_tokens_per_epoch"] * plan["total_steps"] / plan["steps_per_epoch"])


def _method(recipe: dict[str, Any]) -> str:
    return str(recipe["lora"]["init"]["method"])
