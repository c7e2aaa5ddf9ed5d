"""Several jobs in one run, when something happens to the process that they share.

The worker, the database and the storage are real; a script stands in the child's place.
"""

import os
import time
from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.exc import OperationalError

from api.core.db.database import session_scope
from api.core.db.tables import Job
from api.core.jobs import jobs
from api.core.jobs.jobs import Lease
from api.core.settings import get_settings
from tests.worker.conftest import Lab, when
from worker import tasks
from worker.app import drain_file
from worker.job import artifacts

pytestmark = [pytest.mark.usefixtures("service"), pytest.mark.one_database]


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("os.kill(os.getpid(), 9)", "was killed (signal 9)"),
        ("sys.exit(3)", "ended with exit code 3 and reported nothing"),
    ],
)
def test_who_was_in_a_process_that_died_is_tried_again_alone(lab: Lab, end: str, words: str) -> None:
    lab.run(f"""
        for i in range(3): step(i, 1)
        done(2)
        time.sleep(0.5)
        {end}
    """)
    assert lab.statuses() == ["queued", "queued", "succeeded"]
    assert words in lab.story(1)[-1]
    assert [lab.job(seed).attempts for seed in (1, 2)] == [1, 1]
    lab.run("assert [member.name for member in members] == [1]; done(0)")
    assert lab.statuses() == ["succeeded", "queued", "succeeded"]


def test_memory_that_ran_out_in_company_is_no_verdict_on_one_job(lab: Lab) -> None:
    lab.run("for i in range(3): step(i, 1); failed(i, 'out_of_memory')\nsys.exit(1)")
    assert lab.statuses() == ["queued"] * 3
    assert "ran out of memory; the job will be tried again alone" in lab.story(1)[-1]
    lab.run("failed(0, 'out_of_memory'); sys.exit(1)")
    assert lab.statuses() == ["failed", "queued", "queued"]


def test_a_job_whose_only_attempt_died_in_company_fails(lab: Lab, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("LORAINIT_MAX_ATTEMPTS", "1")
    get_settings.cache_clear()
    lab.run("os.kill(os.getpid(), 9)")
    assert lab.statuses() == ["failed"] * 3


@pytest.mark.parametrize("code", ["hub_unavailable", "worker_lost"])
def test_what_may_pass_is_tried_again_and_named_in_the_end(
    lab: Lab, environment: pytest.MonkeyPatch, code: str
) -> None:
    """A hub that is away, another process of the run that does not answer."""
    environment.setenv("LORAINIT_MAX_ATTEMPTS", "2")
    get_settings.cache_clear()
    script = f"for i in range(len(members)): failed(i, '{code}')"
    lab.run(script)
    assert lab.statuses() == ["queued"] * 3
    assert lab.story(1)[-1] == f"{code} of 1 while loading; the job goes back to the queue"
    for _ in range(3):  # each alone now
        lab.run(script)
    assert lab.statuses() == ["failed"] * 3
    assert {lab.job(seed).error["code"] for seed in (1, 2, 3)} == {code}  # type: ignore[index]


def test_a_child_that_saw_no_lease_leaves_its_jobs_to_the_reconciler(lab: Lab) -> None:
    lab.run("for i in range(3): step(i, 1)\nsys.exit(75)")
    assert lab.statuses() == ["running"] * 3
    with session_scope() as session:
        session.execute(update(Job).values(lease_until=lab.job(1).created_at))
        assert sorted(jobs.recover_lost_runs(session, max_attempts=3)) == sorted(lab.ids)
        session.commit()
    assert lab.statuses() == ["queued"] * 3


def test_a_leaving_worker_gives_every_member_back_but_the_finished(lab: Lab) -> None:
    flag = drain_file(os.getppid())
    waiting = when(lambda: lab.job(1).status == "succeeded", flag.touch)
    try:
        lab.run("""
            import signal
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
            done(0); step(1, 1); step(2, 1)
            time.sleep(60)
        """)
    finally:
        waiting.join()
        flag.unlink()
    assert lab.statuses() == ["succeeded", "queued", "queued"]
    assert [lab.job(seed).attempts for seed in (2, 3)] == [0, 0]
    assert lab.story(2)[-1] == "The worker is shutting down; the job goes back to the queue"


def test_a_run_that_cannot_be_started_fails_its_jobs(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(tasks, "run_child", refuse)
    tasks.run_job("ftjob-x")
    assert lab.statuses() == ["failed"] * 3
    assert {lab.job(seed).error["code"] for seed in (1, 2, 3)} == {"internal_error"}  # type: ignore[index]


def test_a_notification_while_the_database_is_away_has_no_effect(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reconciler notifies again; an error of the task would be one of ours."""

    def silent(*_: Any, **__: Any) -> None:
        raise OperationalError("SELECT", {}, Exception("the database is silent"))

    monkeypatch.setattr(jobs, "claim", silent)
    tasks.run_job("ftjob-x")
    assert lab.statuses() == ["queued"] * 3


def test_leases_are_renewed_while_results_are_stored(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    renewed: list[bool] = []
    store = artifacts.store_result

    def slow(job: Job, lease: Lease, *rest: Any) -> None:
        before = lab.job(job.seed).lease_until
        time.sleep(0.4)
        after = lab.job(job.seed).lease_until
        renewed.append(before is not None and after is not None and after > before)
        store(job, lease, *rest)

    monkeypatch.setattr(artifacts, "store_result", slow)
    lab.run("for i in range(3): done(i)")
    assert renewed == [True] * 3
    assert lab.statuses() == ["succeeded"] * 3
