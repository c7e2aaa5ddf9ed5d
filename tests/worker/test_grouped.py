"""Several jobs in one run: each keeps its rows, its lease, its end; what happens to one happens to it alone.

The worker, the database and the storage are real; a script stands in the child's place.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from api.core.db.database import session_scope
from api.core.db.tables import Checkpoint, File, Job
from api.core.files.storage import get_storage
from api.core.jobs import jobs
from tests.promises import within
from tests.worker.conftest import Lab, when
from worker.job import artifacts

pytestmark = [pytest.mark.usefixtures("service"), pytest.mark.one_database]


# --- when all goes well -------------------------------------------------------------------------


def test_every_member_gets_its_own_adapter_numbers_and_story(lab: Lab) -> None:
    lab.run("""
        for number in (1, 2):
            for i in range(3): step(i, number)
        for i in range(3): checkpoint(i, 2)
        for i in range(3): done(i)
    """)
    assert lab.statuses() == ["succeeded"] * 3
    for seed in (1, 2, 3):
        assert lab.lost_runs(seed) == [(1, seed), (2, seed)]
        assert lab.job(seed).trained_tokens == seed
        assert f"{seed}".encode() in lab.adapter(seed)[512:520]
        assert lab.job(seed).trained_with == [lab.ids[other] for other in range(3) if other != seed - 1]
        assert lab.story(seed)[-1] == "The job has successfully completed"
    with session_scope() as session:
        stored = session.scalars(select(Checkpoint.job_id).where(Checkpoint.step == 2)).all()
    assert sorted(stored) == sorted(lab.ids)


def test_members_that_train_together_share_one_process(lab: Lab) -> None:
    lab.run("""
        for i in range(len(members)):
            say(i, kind="message", message=f"process {os.getpid()} of {len(members)}")
            done(i)
    """)
    assert len({lab.story(seed)[3] for seed in (1, 2, 3)}) == 1
    assert lab.story(1)[3].endswith("of 3")


def test_a_member_that_finishes_is_stored_while_the_others_go_on(lab: Lab) -> None:
    seen: list[list[str]] = []
    waiting = when(lambda: "succeeded" in lab.statuses(), lambda: (seen.append(lab.statuses()), lab.cancel(1)))
    lab.run("""
        step(0, 1); step(1, 1)
        done(2)
        until(lambda: not held(0))
        step(1, 2); done(1)
    """)
    waiting.join()
    assert seen == [["running", "running", "succeeded"]]
    assert lab.statuses() == ["cancelled", "succeeded", "succeeded"]


def test_one_slow_upload_holds_up_nobody(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    released, store = threading.Event(), artifacts.store_checkpoint

    def slow(job: Job, *rest: Any) -> None:
        if job.seed == 1:
            assert released.wait(300)
        store(job, *rest)

    monkeypatch.setattr(artifacts, "store_checkpoint", slow)
    waiting = when(lambda: lab.statuses()[1:] == ["succeeded", "succeeded"], released.set)
    lab.run("""
        checkpoint(0, 1)
        for number in range(1, 400):
            for i in range(3): step(i, number, total=400)
        for i in range(3): done(i)
    """)
    waiting.join()
    assert released.is_set()
    assert lab.statuses() == ["succeeded"] * 3
    assert len(lab.lost_runs(1)) == 399


def test_workers_that_claim_at_the_same_time_share_no_job(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lab, start = Lab(tmp_path, environment, count=12), threading.Barrier(4)

    def claim(worker: int) -> list[str]:
        start.wait(300)
        with session_scope() as session:
            claimed = jobs.claim(session, f"w{worker}", lease_seconds=30, group_size=3)
            session.commit()
        return [job.id for job in claimed]

    with ThreadPoolExecutor(4) as workers:
        taken = [job_id for group in workers.map(claim, range(4)) for job_id in group]
    assert len(taken) == len(set(taken))
    assert set(taken) <= set(lab.ids)
    assert lab.statuses().count("running") == len(taken)


def test_a_job_alone_takes_the_same_path(lab: Lab) -> None:
    lab.cancel(2)
    lab.cancel(3)
    lab.run("assert len(members) == 1; step(0, 1); done(0)")
    assert lab.statuses() == ["succeeded", "cancelled", "cancelled"]
    assert lab.job(1).trained_with == []


# --- when something happens to one --------------------------------------------------------------


def test_a_cancelled_members_lease_goes_and_the_others_finish(lab: Lab) -> None:
    waiting = when(lambda: lab.lost_runs(2), lambda: lab.cancel(2))
    lab.run("""
        for i in range(3): shown(i, 1)
        until(lambda: not held(1))
        assert held(0) and held(2)
        step(1, 2)
        for i in (0, 2): step(i, 2); done(i)
    """)
    waiting.join()
    assert lab.statuses() == ["succeeded", "cancelled", "succeeded"]
    assert lab.story(2)[-1] == "The job was cancelled"
    assert [lab.lost_runs(seed) for seed in (1, 2, 3)] == [[(1, 1), (2, 1)], [(1, 2)], [(1, 3), (2, 3)]]


def test_when_all_members_are_cancelled_the_process_is_killed(lab: Lab) -> None:
    def cancel_all() -> None:
        for seed in (1, 2, 3):
            lab.cancel(seed)

    waiting, started = when(lambda: lab.lost_runs(3), cancel_all), time.monotonic()
    lab.run("""
        import signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for i in range(3): shown(i, 1)
        time.sleep(60)
    """)
    waiting.join()
    assert time.monotonic() - started < within(5)
    assert lab.statuses() == ["cancelled"] * 3


def test_a_members_nan_fails_that_member_at_once(lab: Lab) -> None:
    waiting = when(lambda: lab.job(2).status == "failed", lambda: lab.cancel(3))
    lab.run("""
        for i in range(3): shown(i, 1)
        failed(1)
        until(lambda: not held(2))
        step(0, 2); done(0)
        sys.exit(1)
    """)
    waiting.join()
    assert lab.statuses() == ["succeeded", "failed", "cancelled"]
    assert lab.job(2).error == {"code": "non_finite_loss", "message": "non_finite_loss of 2.", "param": None}
    assert lab.job(2).result_file_id is not None
    assert lab.lost_runs(1) == [(1, 1), (2, 1)]


def test_a_member_that_somebody_else_took_over_is_written_no_more(lab: Lab) -> None:
    def lose() -> None:
        with session_scope() as session:
            session.execute(update(Job).where(Job.id == lab.ids[0]).values(lease_token=Job.lease_token + 1))
            session.commit()

    waiting = when(lambda: lab.lost_runs(1), lose)
    lab.run("""
        for i in range(3): shown(i, 1)
        until(lambda: not held(0))
        for i in range(3): step(i, 2); done(i)
    """)
    waiting.join()
    assert lab.statuses() == ["running", "succeeded", "succeeded"]
    assert lab.lost_runs(1) == [(1, 1)]


def test_a_member_whose_file_is_gone_fails_alone_and_the_others_start(lab: Lab) -> None:
    with session_scope() as session:
        key = session.get_one(File, lab.job(1).training_file_id).storage_key
    get_storage().delete(key)
    lab.run("""
        assert [member.name for member in members] == [2, 3]
        for i in range(2): step(i, 1); done(i)
    """)
    assert lab.statuses() == ["failed", "succeeded", "succeeded"]
    assert lab.job(1).error["code"] == "internal_error"  # type: ignore[index]
    assert [lab.lost_runs(seed) for seed in (2, 3)] == [[(1, 2)], [(1, 3)]]


def break_the_store(monkeypatch: pytest.MonkeyPatch, *, seed: int) -> None:
    """Let the result of the job with this seed be one that cannot be stored."""
    store = artifacts.store_result

    def broken(job: Job, *rest: Any) -> None:
        if job.seed == seed:
            raise ValueError("a bug")
        store(job, *rest)

    monkeypatch.setattr(artifacts, "store_result", broken)


def test_a_member_whose_result_cannot_be_stored_fails_alone(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    break_the_store(monkeypatch, seed=2)
    lab.run("for i in range(3): step(i, 1); done(i)")
    assert lab.statuses() == ["succeeded", "failed", "succeeded"]
    assert lab.job(2).error["code"] == "internal_error"  # type: ignore[index]


@pytest.mark.parametrize("stage", ["exporting", "verifying"])
def test_one_that_fails_at_its_end_leaves_the_others_training(lab: Lab, stage: str) -> None:
    lab.run(f"""
        for i in range(3): shown(i, 1)
        checkpoint(0, 1)
        say(0, kind="stage", stage="{stage}", message="")
        failed(0, "export_check_failed")
        for i in (1, 2): step(i, 2); done(i)
        sys.exit(1)
    """)
    assert lab.statuses() == ["failed", "succeeded", "succeeded"]
    assert lab.job(1).error["code"] == "export_check_failed"  # type: ignore[index]
    assert [lab.lost_runs(seed) for seed in (2, 3)] == [[(1, 2), (2, 2)], [(1, 3), (2, 3)]]


def test_one_that_cannot_be_stored_leaves_the_others_training(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    break_the_store(monkeypatch, seed=1)
    lab.run("""
        for i in range(3): shown(i, 1)
        done(0)
        until(lambda: not held(0))
        for i in (1, 2): step(i, 2); done(i)
    """)
    assert lab.statuses() == ["failed", "succeeded", "succeeded"]
    assert [lab.lost_runs(seed) for seed in (2, 3)] == [[(1, 2), (2, 2)], [(1, 3), (2, 3)]]


def test_one_whose_end_ran_out_of_memory_is_tried_alone_from_its_last_step(lab: Lab) -> None:
    lab.run("""
        for i in range(3): shown(i, 1)
        checkpoint(0, 10)
        failed(0, "out_of_memory")
        for i in (1, 2): step(i, 2); done(i)
        sys.exit(1)
    """)
    assert lab.statuses() == ["queued", "succeeded", "succeeded"]
    lab.run("""
        assert (Path(json.loads(members[0].spec.read_text())["resume_from"]) / "state.json").is_file()
        done(0)
    """)
    assert lab.statuses() == ["succeeded"] * 3


def test_a_crash_while_one_waits_to_be_verified_loses_nothing_of_its_training(lab: Lab) -> None:
    lab.run("""
        for i in range(3): shown(i, 1)
        checkpoint(0, 10)
        say(0, kind="message", message="Put off", data={"kind": "export", "put_off": True})
        step(1, 2)
        time.sleep(0.5)
        os.kill(os.getpid(), 9)
    """)
    assert lab.statuses() == ["queued"] * 3
    lab.run("""
        assert (Path(json.loads(members[0].spec.read_text())["resume_from"]) / "state.json").is_file()
        done(0)
    """)
    assert lab.statuses() == ["succeeded", "queued", "queued"]
