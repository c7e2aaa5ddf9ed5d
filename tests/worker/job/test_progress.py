"""The child's events become rows, or nothing at all when the job is not ours any more."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from api.core.db.database import session_scope
from api.core.db.tables import Counter, Event, Job, Project
from api.core.jobs import events, jobs, metrics
from api.core.jobs.jobs import Lease
from lorainit.config.events import InitReport, Message, Metrics, Plan, Stage, Tick
from tests.statements import statements
from tests.things import a_job, a_project, a_running_job
from worker.job import progress
from worker.job.progress import EventRecorder, LeaseLost

pytestmark = [pytest.mark.usefixtures("service"), pytest.mark.one_database]


@pytest.fixture
def lease() -> Lease:
    with session_scope() as session:
        _, lease = a_running_job(session, a_project(session))
        session.commit()
    return lease


def step(number: int, *, total: int = 10, **values: float) -> Metrics:
    return Metrics(step=number, total_steps=total, epoch=0.1, tokens=5, seconds=float(number), **values)


def job_of(lease: Lease) -> Job:
    with session_scope() as session:
        return session.get_one(Job, lease.job_id)


def test_metrics_become_rows_and_events(lease: Lease) -> None:
    recorder = EventRecorder(lease)
    recorder.add(step(1, train_loss=2.5))
    recorder.add(step(2, train_loss=2.0, full_valid_loss=2.2))
    recorder.flush()
    with session_scope() as session:
        rows = list(metrics.read(session, lease.job_id))
        events = session.scalars(select(Event).where(Event.type == "metrics").order_by(Event.sequence)).all()
    assert [(row["step"], row["train_loss"]) for row in rows] == [(1, 2.5), (2, 2.0)]
    assert [event.message for event in events if event.job_id == lease.job_id] == [
        "Step 1/10: training loss=2.50",
        "Step 2/10: training loss=2.00 validation loss=2.20",
    ]


def test_a_long_run_writes_every_row_but_few_events(lease: Lease) -> None:
    recorder = EventRecorder(lease)
    for number in range(1, 1001):
        recorder.add(step(number, total=1000, train_loss=1.0))
    recorder.flush()
    with session_scope() as session:
        assert len(list(metrics.read(session, lease.job_id))) == 1000
        points = session.scalars(select(Event).where(Event.job_id == lease.job_id, Event.type == "metrics")).all()
    assert len(points) == 200


def test_a_flush_of_many_steps_takes_no_more_statements_than_one_of_few(lease: Lease) -> None:
    recorder, counts = EventRecorder(lease), list[int]()
    for steps in (range(1, 3), range(3, 103)):
        for number in steps:
            recorder.add(step(number, total=200, train_loss=1.0))
            recorder.add(Message(message=f"after step {number}"))
        with statements() as seen:
            recorder.flush()
        counts.append(len(seen))
    assert counts[0] == counts[1]
    with session_scope() as session:
        story = session.scalars(
            select(Event.message).where(Event.job_id == lease.job_id).order_by(Event.sequence)
        ).all()
    told = [[f"Step {number}/200: training loss=1.00", f"after step {number}"] for number in range(1, 103)]
    assert story[-204:] == [text for pair in told for text in pair]


def test_a_run_faster_than_its_worker_is_written_a_thousand_events_at_a_time(
    lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "FLUSH_SECONDS", 60.0)
    recorder = EventRecorder(lease)
    due = []
    for number in range(1, 2502):
        recorder.add(step(number, total=3000, train_loss=1.0))
        if recorder.is_due:
            due.append(number)
            recorder.flush()
    assert due == [1000, 2000]


def test_plan_report_and_messages_reach_the_job(lease: Lease) -> None:
    recorder = EventRecorder(lease)
    recorder.add(Message(message="Initializing", data={"kind": "init"}))
    recorder.add(InitReport(report={"method": "loram"}))
    recorder.flush()
    job = job_of(lease)
    assert job.init_report == {"method": "loram"}
    assert job.event_count == 4


def test_the_percentage_never_falls_and_stays_below_100(lease: Lease) -> None:
    recorder, seen = EventRecorder(lease), list[float]()
    story = [
        Stage(stage="loading", message=""),
        Stage(stage="initializing", message=""),
        *[Tick(done=n, total=4) for n in range(5)],
        Stage(stage="evaluating", message=""),
        Stage(stage="training", message=""),
        *[step(n, train_loss=1.0) for n in range(1, 11)],
        Stage(stage="exporting", message=""),
        Stage(stage="verifying", message=""),
    ]
    for event in story:
        recorder.add(event)
        seen.append(recorder.progress["percent"])
    assert seen == sorted(seen)
    assert 90 < seen[-1] < 100


def test_the_time_left_follows_the_pace_of_the_last_steps(lease: Lease) -> None:
    recorder = EventRecorder(lease)
    recorder.add(Metrics(step=1, total_steps=100, epoch=0, tokens=1, seconds=60.0))
    assert recorder.progress["remaining_seconds"] == 60 * 99  # of a slow first step, and better than nothing
    for number in range(2, 51):
        recorder.add(Metrics(step=number, total_steps=100, epoch=0, tokens=1, seconds=60.0 + number))
    assert recorder.progress["remaining_seconds"] == 50


PLAN = Plan(
    total_steps=10, steps_per_epoch=5, rows=40, trained_tokens_per_epoch=100, micro_batch_size=4,
    tokens_per_pass=2, modules=3, trainable_parameters=9, target_modules=["q_proj"], device="cpu",
    precision="fp32",
)  # fmt: skip


def an_earlier_run(lease: Lease, **changes: Any) -> None:
    """A success like the job of `lease`: 20 s of training for half its tokens, and 100 s of everything else."""
    with session_scope() as session:
        project = session.get_one(Project, session.get_one(Job, lease.job_id).project_id)
        seconds = {"starting": 10.0, "loading": 60.0, "training": 15.0, "evaluating": 5.0, "verifying": 30.0}
        plan = PLAN.model_copy(update={"total_steps": 5}).model_dump(mode="json", exclude={"kind", "member"})
        at = datetime.now(UTC)
        ended = {"status": "succeeded", "finished_at": at, "lease_token": 1, "plan": plan}
        a_job(session, project, **{**ended, "progress": {"stage_seconds": seconds}, **changes})
        session.commit()


def test_before_the_first_step_the_time_left_is_that_of_the_last_run_like_it(lease: Lease) -> None:
    an_earlier_run(lease)
    recorder = EventRecorder(lease)
    recorder.add(Stage(stage="loading", message=""))
    recorder.flush()
    assert recorder.progress["remaining_seconds"] is None  # how much there is to do is not known yet
    recorder.add(PLAN)
    recorder.add(step(0, full_valid_loss=2.0))  # the start, evaluated: no step yet
    recorder.flush()
    stored = job_of(lease).progress
    assert stored is not None
    assert stored["remaining_seconds"] == pytest.approx(100 + 2 * 20, abs=5)
    recorder.add(step(1, train_loss=2.0))
    recorder.flush()
    assert recorder.progress["remaining_seconds"] == 9  # what this run itself shows counts from then on


@pytest.mark.parametrize(
    "changes", [{"status": "cancelled"}, {"model": "other"}, {"queue": "gpu"}, {"lease_token": 2}, {"plan": None}]
)
def test_a_run_unlike_it_is_no_measure(lease: Lease, changes: dict[str, Any]) -> None:
    an_earlier_run(lease, **changes)
    recorder = EventRecorder(lease)
    recorder.add(PLAN)
    recorder.flush()
    assert recorder.progress["remaining_seconds"] is None


def test_the_plan_is_stored_for_the_job_object(lease: Lease) -> None:
    recorder = EventRecorder(lease)
    recorder.add(PLAN)
    assert recorder.is_due
    recorder.flush()
    stored = job_of(lease).plan
    assert stored is not None
    assert stored["total_steps"] == 10


def test_the_members_number_is_the_runs_business_and_is_not_stored(lease: Lease) -> None:
    recorder = EventRecorder(lease)
    recorder.add(step(1, train_loss=1.0).model_copy(update={"member": 3}))
    recorder.flush()
    with session_scope() as session:
        (row,) = metrics.read(session, lease.job_id)
        event = session.scalars(select(Event).where(Event.type == "metrics", Event.job_id == lease.job_id)).one()
    assert "member" not in row
    assert "member" not in event.data


def test_what_could_not_be_written_is_written_later(lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = EventRecorder(lease)
    recorder.add(step(1, train_loss=1.0))
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "save_steps", raising(OperationalError("INSERT", {}, Exception("gone"))))
        with pytest.raises(OperationalError):
            recorder.flush()
    recorder.flush()
    recorder.flush()
    with session_scope() as session:
        assert [row["step"] for row in metrics.read(session, lease.job_id)] == [1]


def test_a_flush_whose_commit_went_through_unheard_is_not_written_twice(
    lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, commit = EventRecorder(lease), Session.commit

    def unheard(session: Session) -> None:
        commit(session)
        raise OperationalError("COMMIT", {}, Exception("the connection is gone"))

    recorder.add(step(1, train_loss=1.0))
    recorder.add(Message(message="smaller batches", data={"kind": "oom_retry"}))
    with monkeypatch.context() as patch:
        patch.setattr(Session, "commit", unheard)
        with pytest.raises(OperationalError):
            recorder.flush()
    recorder.add(step(2, train_loss=1.0))
    recorder.flush()
    with session_scope() as session:
        story = events.list_since(session, lease.job_id, 3, limit=10)
        retries = session.scalar(select(Counter.value).where(Counter.name == "out_of_memory"))
        assert [row["step"] for row in metrics.read(session, lease.job_id)] == [1, 2]
    told = ["Step 1/10: training loss=1.00", "smaller batches", "Step 2/10: training loss=1.00"]
    assert [(row.sequence, row.message) for row in story] == list(enumerate(told, start=4))
    assert retries == 1


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_a_writer_that_lost_the_job_writes_nothing(lease: Lease) -> None:
    recorder = EventRecorder(lease)
    with session_scope() as session:
        jobs.cancel(session, session.get_one(Job, lease.job_id))
        session.commit()
    before = job_of(lease).event_count
    recorder.add(step(1, train_loss=1.0))
    with pytest.raises(LeaseLost):
        recorder.flush()
    with session_scope() as session:
        assert list(metrics.read(session, lease.job_id)) == []
    assert job_of(lease).event_count == before
