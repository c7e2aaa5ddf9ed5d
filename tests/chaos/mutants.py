"""The product with one of its safeguards taken out. Chaos that does not notice proves nothing.

Switched on by CHAOS_MUTANT, in the processes that tests/chaos starts; no product code knows of it.
"""

import os
from collections.abc import Callable
from typing import Any

from sqlalchemy import select

from api.core import jobs
from api.core.models import Job
from api.core.queue import get_celery
from worker import lease, reconciler


def no_watchdog() -> None:
    """The lease file never runs out: a trainer whose supervisor is frozen goes on for ever."""

    def write(keeper: lease.LeaseKeeper) -> None:
        keeper._file.write_text("inf")

    lease.LeaseKeeper._write_file = write  # type: ignore[method-assign]


def no_fence() -> None:
    """Whoever writes for a running job is believed, whichever token it holds."""

    def write(session: Any, held: jobs.Lease, **values: Any) -> bool:
        return jobs._change(session, [Job.id == held.job_id, Job.status == "running"], values)

    jobs._write = write


def late_ack() -> None:
    """Trust in the queue: a message is acknowledged when the job is over, comes back when that takes
    longer than the visibility timeout, and whoever gets it runs the job it names."""
    get_celery().conf.update(
        task_acks_late=True,
        worker_disable_prefetch=False,
        broker_transport_options={
            **get_celery().conf.broker_transport_options,
            "visibility_timeout": 2,
            "unacked_restore_interval": 1,
            "unacked_restore_throttle": 1,
        },
    )
    _claim_what_is_rung_for()


def _claim_what_is_rung_for() -> None:
    from worker import tasks

    rung: list[str] = []
    run = tasks.run_job.run

    def named(session: Any, *, size: int) -> list[str]:
        query = select(Job.id).where(Job.id == rung[-1], Job.status.in_(("queued", "running")))
        return list(session.scalars(query))

    def take(session: Any, job_id: str, owner: str, *, at: Any, until: Any) -> bool:
        taken = {"lease_token": Job.lease_token + 1, "lease_owner": owner, "lease_until": until}
        again = {"attempts": Job.attempts + 1, "started_at": at}
        return jobs._change(session, [Job.id == job_id], {"status": "running", **taken, **again})

    def run_job(job_id: str) -> None:
        rung.append(job_id)
        run(job_id)

    jobs.groups.next_up = named  # type: ignore[assignment]
    jobs._take = take
    tasks.run_job.run = run_job


def no_second_ring() -> None:
    """A message that the broker forgot is never sent again."""
    reconciler.CHORES = tuple(chore for chore in reconciler.CHORES if chore is not reconciler.announce)


def no_recovery() -> None:
    """The job of a worker that fell silent stays with it."""
    reconciler.CHORES = tuple(chore for chore in reconciler.CHORES if chore is not reconciler.recover)


MUTANTS: dict[str, Callable[[], None]] = {
    "no-watchdog": no_watchdog,
    "no-fence": no_fence,
    "late-ack": late_ack,
    "no-second-ring": no_second_ring,
    "no-recovery": no_recovery,
}


def apply() -> None:
    """Become the mutant that the environment asks for, if any."""
    name = os.environ.get("CHAOS_MUTANT")
    if name:
        MUTANTS[name]()
