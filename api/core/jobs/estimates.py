"""How long a run will take, from the last one like it: of its project, on the same base, with the same initialization.

Before the first step nothing else would be honest: loading and initializing depend on disk and method, and a step on
the machine. A run that goes on from a checkpoint neither gives an estimate nor gets one: its times are those of a part.
"""

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from api.core.db.tables import Job

TRAINING = ("training", "evaluating")  # last longer the more there is to train on; other stages as long as they did
_LOOKED_AT = 20  # of the project's last successes on the base; what is older tells little


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
    """What a run took, had it trained on so many tokens."""
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
