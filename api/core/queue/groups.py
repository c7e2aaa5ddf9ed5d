"""Which queued jobs are trained together, in one process and in one forward pass over one base.

Only jobs that ask for it, and that have the same project, priority and group key. A job of lower priority may not
join, because every member makes the common step longer and would slow down the others. Only first
attempts: a job whose process crashed may be the cause, and must not crash others again. Nothing is
written here: `jobs.claim` starts the jobs.
"""

import hashlib
import json
from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from api.core.db.tables import Job, has_status
from api.core.models.catalogue import Entry
from api.core.queue import scheduling
from lorainit.config.spec import Hyperparameters, Lora
from lorainit.config.target_modules import count_chosen

# What the members' batches must have in common: their numeric type, and their shape, since a member with
# longer or more rows makes all others wait.
_SHAPE = {"precision", "batch_size", "max_length"}


def compute_group_key(base: Entry, lora: Lora, *, training: Hyperparameters, deterministic: bool) -> str | None:
    """Equal for jobs that can share a forward pass and gain from it: 64 hex digits; None = it runs alone.

    A job with adapters of experts runs alone, because a router mixes the rows of all jobs before they reach an expert.
    Data, ranks, targets, methods, seeds, rates, schedules, optimizers and lengths of the runs may differ.

    Args:
        training: resolved, so that an "auto" and the number that it stands for give the same key.
    """
    if any(target.experts and count_chosen(target, lora.target_modules) for target in base.targets):
        return None
    facts = {
        "base": [base.id, base.base_sha256],
        "quantization": lora.quantization,
        "use_dora": lora.use_dora,
        "deterministic": deterministic,
        **training.model_dump(mode="json", include=_SHAPE),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def lock_next_group(session: Session, *, size: int, queues: Sequence[str]) -> list[str]:
    """Ids of the queued jobs to start next, locked: the best one (`scheduling`), then its companions in queue order.

    The best one is taken whatever group it asks for. At most `size` - 1 others join it, and no more than their project
    may run.
    """
    while (best := scheduling.lock_next_job(session, queues)) is not None:
        if (places := scheduling.count_startable(session, best.project_id, wanted=size)) > 0:
            break  # otherwise another claim used up the project's limit; look again, now that its jobs count
    if best is None:
        return []
    if best.group_key is None or best.attempts or places == 1:
        return [best.id]
    companions = (
        select(Job.id)
        .where(
            has_status(Job, "queued"),
            Job.queue == best.queue,
            Job.project_id == best.project_id,
            Job.group_key == best.group_key,
            Job.priority == best.priority,
            Job.attempts == 0,
            Job.id != best.id,
        )
        .order_by(Job.priority_time, Job.id)
        .limit(places - 1)
        .with_for_update(skip_locked=True)  # because waiting for another claim would delay the best job
    )
    return [best.id, *session.scalars(companions)]
