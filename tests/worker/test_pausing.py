"""A pause, a drain or a loss in the middle of a run: what the worker stores, and where the job goes."""

import os

import pytest
from sqlalchemy import select, update

from api.core.db.database import session_scope
from api.core.db.tables import Checkpoint, Job
from api.core.files.storage import ObjectStorage
from api.core.jobs import checkpoints, jobs, pauses
from tests.worker.conftest import Lab, when
from worker.app import drain_file
from worker.child import supervisor
from worker.host import memory
from worker.job import retry

pytestmark = pytest.mark.one_database


# A child that does as a run does: asked to leave, it writes a checkpoint, tells it and goes.
LEAVING = """
    import signal
    def leave(*_):
        for i in range(len(members)): checkpoint(i, 2)
        sys.exit(143)
    signal.signal(signal.SIGTERM, leave)
    for i in range(len(members)): shown(i, 1)
    time.sleep(60)
"""


@pytest.fixture
def alone(lab: Lab) -> Lab:
    """The lab, with one job that asks for no company."""
    with session_scope() as session:
        for job_id in lab.ids[1:]:
            jobs.cancel(session, session.get_one(Job, job_id))
        session.execute(update(Job).where(Job.id == lab.ids[0]).values(group_key=None))
        session.commit()
    return lab


def pause(lab: Lab, seed: int) -> None:
    with session_scope() as session:
        pauses.pause(session, session.get_one(Job, lab.ids[seed - 1]))
        session.commit()


def resume(lab: Lab, seed: int) -> None:
    with session_scope() as session:
        pauses.resume(session, session.get_one(Job, lab.ids[seed - 1]))
        session.commit()


def steps_stored(lab: Lab, seed: int) -> list[int]:
    query = select(Checkpoint.step).where(Checkpoint.job_id == lab.ids[seed - 1]).order_by(Checkpoint.step)
    with session_scope() as session:
        return list(session.scalars(query))


def test_a_paused_run_stores_its_checkpoint_and_goes_on_from_it(alone: Lab) -> None:
    waiting = when(lambda: alone.lost_runs(1), lambda: pause(alone, 1))
    alone.run(LEAVING)
    waiting.join()
    job = alone.job(1)
    assert (job.status, job.attempts, job.lease_owner) == ("paused", 0, None)
    assert steps_stored(alone, 1) == [2]
    assert alone.story(1)[-1] == "The run was stopped for a pause; the job is paused"
    resume(alone, 1)
    alone.run("""
        assert (members[0].spec.parent / "resume" / "state.json").exists()
        assert json.loads(members[0].spec.read_text())["resume_from"].endswith("resume")
        done(0)
    """)
    assert alone.job(1).status == "succeeded"


def test_a_leaving_workers_job_goes_back_with_a_checkpoint(alone: Lab) -> None:
    flag = drain_file(os.getppid())
    waiting = when(lambda: alone.lost_runs(1), flag.touch)
    try:
        alone.run(LEAVING)
    finally:
        waiting.join()
        flag.unlink()
    assert (alone.job(1).status, alone.job(1).attempts) == ("queued", 0)
    assert steps_stored(alone, 1) == [2]


def test_pausing_one_of_a_shared_run_sends_the_others_back_with_their_checkpoints(lab: Lab) -> None:
    waiting = when(lambda: lab.lost_runs(3), lambda: pause(lab, 2))
    lab.run(LEAVING)
    waiting.join()
    assert lab.statuses() == ["queued", "paused", "queued"]
    assert [steps_stored(lab, seed) for seed in (1, 2, 3)] == [[2]] * 3
    assert [lab.job(seed).attempts for seed in (1, 2, 3)] == [0, 0, 0]
    assert lab.story(1)[-1] == "The run was stopped for a pause; the job goes back to the queue"


def test_a_pausing_run_that_is_cancelled_is_killed_at_once(alone: Lab) -> None:
    waiting = when(lambda: alone.lost_runs(1), lambda: pause(alone, 1))
    cancelling = when(lambda: alone.job(1).pause_requested, lambda: alone.cancel(1))
    alone.run("""
        import signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        shown(0, 1)
        time.sleep(60)
    """)
    waiting.join()
    cancelling.join()
    assert alone.job(1).status == "cancelled"


# --- lost, or to blame? ---------------------------------------------------------------------------


@pytest.mark.parametrize(("kills", "status", "code"), [([3, 3], "queued", None), ([3, 4], "failed", "out_of_memory")])
def test_a_killed_run_failed_only_if_the_system_had_run_out_of_memory(
    alone: Lab, monkeypatch: pytest.MonkeyPatch, kills: list[int], status: str, code: str | None
) -> None:
    counts = iter(kills)
    monkeypatch.setattr(supervisor, "count_oom_kills", lambda: next(counts))
    alone.run("shown(0, 1); os.kill(os.getpid(), 9)")
    job = alone.job(1)
    assert (job.status, (job.error or {}).get("code")) == (status, code)
    assert job.lost_runs == (1 if status == "queued" else 0)


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 15)", "sys.exit(143)"])
def test_a_run_that_somebody_else_stopped_is_tried_again(alone: Lab, end: str) -> None:
    alone.run(f"shown(0, 1); {end}")
    assert (alone.job(1).status, alone.job(1).lost_runs) == ("queued", 1)
    assert alone.story(1)[-1].endswith("while training; the job goes back to the queue")


def test_a_run_killed_over_and_over_fails_and_says_where(alone: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "count_oom_kills", lambda: 0)
    for _ in range(3):
        alone.run("shown(0, 1); os.kill(os.getpid(), 9)")
        with session_scope() as session:
            session.execute(update(Job).values(not_before=None))
            session.commit()
    error = alone.job(1).error
    assert error is not None
    assert error["code"] == "worker_lost"
    assert error["message"] == (
        "The job was lost 3 times without a new checkpoint."
        " The last time: The training process was killed (signal 9) while training."
    )


def test_a_run_that_gets_further_each_time_is_never_given_up(alone: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "count_oom_kills", lambda: 0)
    for number in range(1, 5):
        alone.run(f"step(0, {number}); checkpoint(0, {number}); time.sleep(0.3); os.kill(os.getpid(), 9)")
        assert (alone.job(1).status, alone.job(1).lost_runs) == ("queued", 1)
    with session_scope() as session:
        assert checkpoints.find_latest(session, alone.ids[0]).step == 4  # type: ignore[union-attr]


def test_a_storage_that_stays_away_is_not_the_jobs_fault(alone: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object, **__: object) -> None:
        raise retry.TRANSIENT[-1]("the bucket does not answer")

    monkeypatch.setattr(retry, "LONGEST_SECONDS", 0.3)
    monkeypatch.setattr(ObjectStorage, "put", away)
    alone.run("step(0, 1); done(0)")
    assert (alone.job(1).status, alone.job(1).lost_runs) == ("queued", 1)
    assert "could not reach the database or the storage" in alone.story(1)[-1]


# --- the count of kills -----------------------------------------------------------------------------


@pytest.fixture
def kernel(tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch) -> os.PathLike[str]:
    """A kernel's files: our cgroup `jobs` and the host's counters."""
    for name, path in {"CGROUPS": "cgroup", "OWN_CGROUP": "own", "HOST": "vmstat"}.items():
        monkeypatch.setattr(memory, name, tmp_path / path)  # type: ignore[operator]
    return tmp_path


def test_kills_are_counted_in_our_own_cgroup_first(kernel) -> None:
    (kernel / "own").write_text("9:memory:/old\n0::/jobs\n")
    (kernel / "cgroup" / "jobs").mkdir(parents=True)
    (kernel / "cgroup" / "jobs" / "memory.events").write_text("low 0\noom 3\noom_kill 2\noom_group_kill 0\n")
    (kernel / "vmstat").write_text("oom_kill 7\n")
    assert memory.count_oom_kills() == 2


def test_without_such_a_cgroup_the_hosts_kills_are_counted(kernel) -> None:
    (kernel / "own").write_text("4:memory:/somewhere\n0::/\n")
    (kernel / "vmstat").write_text("pgpgin 5\noom_kill 7\n")
    assert memory.count_oom_kills() == 7


def test_a_system_without_such_counters_says_nothing(kernel) -> None:
    assert memory.count_oom_kills() is None
