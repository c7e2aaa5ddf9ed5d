"""The product with one of its safeguards taken out. Chaos that does not notice proves nothing.

Switched on by CHAOS_MUTANT, in the processes that tests/chaos starts; no product code knows of it.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event, text

from api.core.db.database import session_scope
from api.core.queue import notify
from api.core.queue.queue import get_celery
from worker import reconciler, tasks
from worker.child.supervisor import Outcome, RunPaths

_TOKEN = re.compile(r" AND jobs\.lease_token = %\(\w+\)s(::INTEGER)?")


def no_watchdog() -> None:
    """Nobody but its supervisor stops a trainer: the lease file that it watches never runs out."""
    run_child = tasks.run_child

    def run(places: Sequence[RunPaths], **others: Any) -> Outcome:
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


def no_notification() -> None:
    """A message that the broker forgot is never sent again."""
    notify.find_lost = lambda _session, **_: []


def no_recovery() -> None:
    """The job of a worker that fell silent stays with it."""
    reconciler.CHORES = tuple(chore for chore in reconciler.CHORES if chore is not reconciler.recover)


@dataclass(frozen=True)
class Mutant:
    """How to become it, and the attack that needs what it lacks, as options of the command line."""

    become: Callable[[], None]
    attack: Mapping[str, Any]


# One user leaves a slot free, so that a frozen supervisor's job has a successor before it thaws, and its jobs
# are so long that they are still at work then.
_SHORT = {"seconds": 25.0, "settle": 45.0, "kills": 0, "real": 0, "users": 1, "fickle": 0.0, "moody": 0.0, "group": 0.0}
# Without recovery no successor ever comes; with it one does, however busy the machine is.
_FROZEN = {**_SHORT, "only": "supervisor_frozen", "steps": (400, 500), "patience": 300.0}

MUTANTS = {
    "no-watchdog": Mutant(no_watchdog, _FROZEN),
    "no-fence": Mutant(no_fence, _FROZEN),
    "late-ack": Mutant(late_ack, {**_SHORT, "only": "notifications"}),
    # Four users order more than there are slots for, so that messages wait in the broker when it forgets them.
    "no-notification": Mutant(no_notification, {**_SHORT, "only": "wiped", "users": 4, "settle": 15.0}),
    # Its jobs are stuck after a few seconds, and then there is nothing left to kill.
    "no-recovery": Mutant(
        no_recovery,
        {**_SHORT, "only": "supervisor_frozen", "seconds": 8.0, "kills": 4, "settle": 15.0, "patience": 1.0},
    ),
}


def apply() -> None:
    """Become the mutant that the environment asks for, if any."""
    name = os.environ.get("CHAOS_MUTANT")
    if name:
        MUTANTS[name].become()
