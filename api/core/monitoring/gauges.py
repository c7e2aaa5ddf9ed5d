"""The state of the service in the database at this moment, in one short read: the queue, the runs, the workers.

It is read from the database, because no process knows all of it: jobs run in workers, and any API process may be asked.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from api.core.db.database import now
from api.core.db.tables import FINAL_STATUSES, JOB_STATUSES, Job, has_status
from api.core.monitoring import counters
from api.core.monitoring.counters import CounterValue
from api.core.queue import workers

OPEN_STATUSES = tuple(status for status in JOB_STATUSES if status not in FINAL_STATUSES)


@dataclass(frozen=True)
class Snapshot:
    """Jobs by open status, seconds, counts; `speeds`: trained tokens per second of running jobs by method."""

    jobs: Mapping[str, int]
    oldest_wait: float
    unannounced: int
    workers: int
    slots: int
    speeds: Mapping[str, float]
    counters: list[CounterValue]


def take_snapshot(session: Session) -> Snapshot:
    """Read everything. Ended jobs are not counted here: the counters have them."""
    # `is_open` beside a status changes no result, but without it the partial index of open jobs would not be used.
    queued, is_open = has_status(Job, "queued"), Job.finished_at.is_(None)
    by_status = select(Job.status, func.count()).where(is_open).group_by(Job.status)
    found: dict[str, int] = dict(session.execute(by_status).all())
    oldest = session.scalar(select(func.min(Job.created_at)).where(queued, is_open))
    wait = now(session) - oldest if oldest is not None else timedelta()
    return Snapshot(
        jobs={status: found.get(status, 0) for status in OPEN_STATUSES},
        oldest_wait=max(0.0, wait.total_seconds()),
        unannounced=session.scalar(select(func.count()).where(queued, Job.notified_at.is_(None))) or 0,
        workers=workers.count_online(session),
        slots=workers.count_free_slots(session, running=0),
        speeds=_speeds(session),
        counters=counters.read(session),
    )


def _speeds(session: Session) -> dict[str, float]:
    speeds: dict[str, float] = {}
    for recipe, progress in session.execute(select(Job.recipe, Job.progress).where(has_status(Job, "running"))):
        method = str(recipe["lora"]["init"]["method"])
        speeds[method] = speeds.get(method, 0.0) + float((progress or {}).get("tokens_per_second") or 0.0)
    return speeds
