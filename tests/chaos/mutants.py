"""The product with one of its safeguards taken out. Chaos that does not notice proves nothing.

Switched on by CHAOS_MUTANT, in the processes that tests/chaos starts; no product code knows of it.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event, text

from api.core.db import session_scope
from api.core.queue import get_celery
from worker import reconciler, tasks
from worker.supervisor import Outcome, Place

_TOKEN = re.compile(r" AND jobs\.lease_token = %\(\w+\)s(::INTEGER)?")


def no_watchdog() -> None:
    """Nobody but its supervisor stops a trainer: the lease file that it watches never runs out."""
    run_child = tasks.run_child

    def run(places: Sequence[Place], **others: Any) -> Outcome:
        return run_child([replace(place, lease=_endless(place.lease)) for place in places], **others)

    tasks.run_child = run


def _endless(lease: Path) -> Path:
    path = lease.with_name("endless")
    path.write_text("inf")
    return path


def no_fence() -> None:
    """Whoever writes for a job is believed, whichever token it holds: no statement asks for it."""

    @event.listens_for(Engine, "before_cursor_execute", retval=True)
    def unfenced(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> tuple[str, Any]:
        return (_TOKEN.sub("", statement) if statement.startswith("UPDATE jobs") else statement), parameters


def late_ack() -> None:
    """Trust in the queue: a message is acknowledged when its job is over, comes back when that takes longer than
    the visibility timeout, and means that whoever ran the job is dead.
    """
    celery = get_celery()
    options = {"visibility_timeout": 2, "unacked_restore_interval": 1, "unacked_restore_throttle": 1}
    celery.conf.update(
        task_acks_late=True,
        worker_disable_prefetch=False,
        broker_transport_options={**celery.conf.broker_transport_options, **options},
    )
    run = tasks.run_job.run

    def run_job(job_id: str) -> None:
        with session_scope() as session:
            again = "UPDATE jobs SET status = 'queued', lease_owner = NULL, lease_until = NULL"
            session.execute(text(f"{again} WHERE id = :id AND status = 'running'"), {"id": job_id})
            session.commit()
        run(job_id)

    tasks.run_job.run = run_job


def no_ring() -> None:
    """A message that the broker forgot is never sent again."""
    reconciler.CHORES = tuple(chore for chore in reconciler.CHORES if chore is not reconciler.announce)


def no_recovery() -> None:
    """The job of a worker that fell silent stays with it."""
    reconciler.CHORES = tuple(chore for chore in reconciler.CHORES if chore is not reconciler.recover)


MUTANTS: dict[str, Callable[[], None]] = {
    "no-watchdog": no_watchdog,
    "no-fence": no_fence,
    "late-ack": late_ack,
    "no-ring": no_ring,
    "no-recovery": no_recovery,
}


def apply() -> None:
    """Become the mutant that the environment asks for, if any."""
    name = os.environ.get("CHAOS_MUTANT")
    if name:
        MUTANTS[name]()
