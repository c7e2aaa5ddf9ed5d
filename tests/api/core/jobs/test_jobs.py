"""The life of a job: each move is a compare-and-set, and a stale writer writes nothing."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from api.core.db.tables import Adapter, Event, Job, Project
from api.core.errors import WrongState
from api.core.jobs import admission, events, jobs, metrics
from api.core.jobs.jobs import Failure, Lease
from api.core.queue import notify
from lorainit.config.spec import Hyperparameters, Lora
from tests.things import a_file, a_job, a_project, a_queued_job, a_running_job, a_worker


def story(session: Session, job: Job) -> list[str | None]:
    """The statuses a job's events tell, oldest first."""
    rows = session.scalars(select(Event).where(Event.job_id == job.id).order_by(Event.sequence)).all()
    assert [row.sequence for row in rows] == list(range(1, len(rows) + 1))
    return [row.data["status"] for row in rows if row.data.get("kind") == "status"]


def expire(session: Session, job: Job) -> None:
    session.execute(update(Job).where(Job.id == job.id).values(lease_until=datetime.now(UTC) - timedelta(seconds=1)))


def succeed(session: Session, job: Job, lease: Lease) -> bool:
    file = a_file(session, a_project(session), purpose="fine-tune-results")
    return jobs.succeed(
        session,
        lease,
        adapter=Adapter(job_id=job.id, project_id=job.project_id, name=f"ft:{job.id}", file_id=file.id, rank=8),
        files=[],
        result_file_id=None,
        trained_tokens=5,
        export_check={"passed": True},
        resources={},
        progress={"percent": 100.0},
    )


def test_a_job_that_goes_well_tells_each_status_once(session: Session) -> None:
    job, lease = a_running_job(session, a_project(session))
    assert succeed(session, job, lease)
    assert story(session, job) == ["validating_files", "queued", "running", "succeeded"]


def test_claim_takes_the_highest_priority_then_the_oldest(session: Session) -> None:
    project = a_project(session)
    old = a_queued_job(session, project)
    young = a_queued_job(session, project)
    urgent = a_queued_job(session, project, priority=1)
    order = [jobs.claim(session, "w", lease_seconds=30) for _ in range(4)]
    assert [[job.id for job in taken] for taken in order] == [[urgent.id], [old.id], [young.id], []]


def test_each_claim_takes_a_new_token(session: Session) -> None:
    job, lease = a_running_job(session, a_project(session))
    assert jobs.release(session, lease, "draining")
    (again,) = jobs.claim(session, "w2", lease_seconds=30)
    assert again.id == job.id
    assert again.lease_token == lease.token + 1


def test_giving_a_job_back_costs_no_attempt(session: Session) -> None:
    job, lease = a_running_job(session, a_project(session))
    jobs.release(session, lease, "draining")
    session.refresh(job)
    assert (job.attempts, job.notified_at, job.status) == (0, None, "queued")


def test_a_cancelled_job_is_not_claimed(session: Session) -> None:
    job = a_queued_job(session, a_project(session))
    jobs.cancel(session, job)
    assert jobs.claim(session, "w", lease_seconds=30) == []


def test_cancel_is_final_at_once_and_fences_the_worker(session: Session) -> None:
    job, lease = a_running_job(session, a_project(session))
    jobs.cancel(session, job)
    assert (job.status, job.finished_at is not None, job.error) == ("cancelled", True, None)
    assert not jobs.renew_lease(session, lease, lease_seconds=30)
    assert not jobs.update_run(session, lease, progress={})
    assert not jobs.fail(session, lease, Failure("internal_error", "no"))
    assert not succeed(session, job, lease)
    assert story(session, job)[-1] == "cancelled"


def test_cancelling_twice_changes_nothing(session: Session) -> None:
    job = a_queued_job(session, a_project(session))
    first = jobs.cancel(session, job).finished_at
    assert jobs.cancel(session, job).finished_at == first
    assert story(session, job).count("cancelled") == 1


@pytest.mark.parametrize("end", ["succeeded", "failed"])
def test_an_ended_job_cannot_be_cancelled(session: Session, end: str) -> None:
    job, lease = a_running_job(session, a_project(session))
    assert succeed(session, job, lease) if end == "succeeded" else jobs.fail(session, lease, Failure("x", "y"))
    with pytest.raises(WrongState, match=end) as caught:
        jobs.cancel(session, job)
    assert caught.value.code == "invalid_job_state"


def test_a_silent_worker_loses_its_job_to_the_queue(session: Session) -> None:
    job, lease = a_running_job(session, a_project(session))
    expire(session, job)
    assert jobs.recover_lost_runs(session, max_attempts=3) == [job.id]
    session.refresh(job)
    assert (job.status, job.notified_at) == ("queued", None)
    assert not jobs.renew_lease(session, lease, lease_seconds=30)


def test_a_living_worker_keeps_its_job(session: Session) -> None:
    _, lease = a_running_job(session, a_project(session))
    assert jobs.recover_lost_runs(session, max_attempts=3) == []
    assert jobs.renew_lease(session, lease, lease_seconds=30)


def test_a_job_whose_workers_keep_dying_fails_in_the_end(session: Session) -> None:
    job, _ = a_running_job(session, a_project(session))
    for _ in range(2):
        expire(session, job)
        jobs.recover_lost_runs(session, max_attempts=3)
        session.execute(update(Job).values(not_before=None))
        assert jobs.claim(session, "w", lease_seconds=30)
    expire(session, job)
    assert jobs.recover_lost_runs(session, max_attempts=3) == []
    session.refresh(job)
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"] == "worker_lost"
    assert job.error["message"] == (
        "The job was lost 3 times without a new checkpoint. The last time: The worker was lost while loading."
    )


def test_however_often_a_job_was_lost_others_are_recovered(session: Session) -> None:
    """Its wait is a number all the same: all silent jobs are recovered in one transaction."""
    project = a_project(session)
    often, once = (a_running_job(session, project)[0] for _ in range(2))
    often.lost_runs = 5000
    session.flush()
    for job in (often, once):
        expire(session, job)
    assert set(jobs.recover_lost_runs(session, max_attempts=10_000)) == {often.id, once.id}


def test_a_failure_carries_code_message_and_param(session: Session) -> None:
    job, lease = a_running_job(session, a_project(session))
    jobs.fail(session, lease, Failure("rank_too_large", "Too large.", "lora.r"))
    session.refresh(job)
    assert job.error == {"code": "rank_too_large", "message": "Too large.", "param": "lora.r"}
    assert story(session, job)[-1] == "failed"


def test_events_are_numbered_without_gaps_and_paged_newest_first(session: Session) -> None:
    job = a_job(session, a_project(session))
    for number in range(5):
        events.append(session, job.id, f"e{number}", at=datetime.now(UTC))
    first, more = events.list_page(session, job.id, after=None, limit=4)
    rest, end = events.list_page(session, job.id, after=first[-1].id, limit=4)
    assert [row.sequence for row in [*first, *rest]] == [6, 5, 4, 3, 2, 1]
    assert (more, end) == (True, False)


def test_events_added_together_keep_their_order_between_others(session: Session) -> None:
    job = a_job(session, a_project(session))
    events.append_all(session, job.id, [events.EventDraft(f"e{number}") for number in range(5)], at=job.created_at)
    events.append_all(session, job.id, [], at=job.created_at)
    events.append(session, job.id, "after", at=job.created_at)
    told = [(row.sequence, row.message) for row in events.list_since(session, job.id, 1, limit=10)]
    assert told == [(2, "e0"), (3, "e1"), (4, "e2"), (5, "e3"), (6, "e4"), (7, "after")]


def test_an_evaluation_completes_the_row_of_its_step(session: Session) -> None:
    job, lease = a_running_job(session, a_project(session))
    trained, evaluated = {"train_loss": 1.0, "full_valid_loss": None}, {"train_loss": None, "full_valid_loss": 2.0}
    metrics.save_steps(session, job.id, lease.token, [(3, trained), (4, trained), (4, evaluated)], at=job.created_at)
    metrics.save_steps(session, job.id, lease.token, [(3, evaluated)], at=job.created_at)
    both = {"train_loss": 1.0, "full_valid_loss": 2.0}
    assert list(metrics.read(session, job.id)) == [{**both, "step": 3}, {**both, "step": 4}]


def test_a_resumed_run_replaces_the_rows_of_the_lost_one(session: Session) -> None:
    job, lease = a_running_job(session, a_project(session))
    lost = [(step, {"train_loss": float(step), "grad_norm": 1.0}) for step in (1, 2, 3)]
    metrics.save_steps(session, job.id, lease.token, lost, at=job.created_at)
    metrics.delete_after(session, job.id, 2)
    again = {"train_loss": 9.0, "grad_norm": None}
    metrics.save_steps(session, job.id, lease.token + 1, [(2, again), (3, again)], at=job.created_at)
    assert [(row["train_loss"], row["grad_norm"]) for row in metrics.read(session, job.id)] == [
        (1.0, 1.0), (9.0, None), (9.0, None),
    ]  # fmt: skip


# --- admission and the outbox -------------------------------------------------------------------


def test_admission_replaces_auto_by_numbers_and_says_why(session: Session) -> None:
    job = a_job(session, a_project(session))
    assert admission.consider(session, job.id) == "queued"
    session.refresh(job)
    training = job.recipe["training"]
    assert (training["n_epochs"], training["batch_size"], training["learning_rate"]) == (5, 8, 1e-3)
    assert "method.supervised.hyperparameters.n_epochs" in {choice["param"] for choice in job.choices}


def test_admission_waits_for_an_unchecked_file(session: Session) -> None:
    project = a_project(session)
    job = a_job(session, project, file=a_file(session, project, status="uploaded", validation=None))
    assert admission.consider(session, job.id) == "waiting"
    assert admission.find_ready(session) == []


def calibrated(session: Session, project: Project, **changes: Any) -> Job:
    file = a_file(session, project, **changes)
    lora, _ = Lora.model_validate({"init": {"method": "eva", "calibration_file": file.id}}).resolve()
    recipe = {"lora": lora.model_dump(mode="json"), "training": Hyperparameters().model_dump(mode="json")}
    return a_job(session, project, recipe=recipe)


def test_admission_waits_for_the_calibration_file(session: Session) -> None:
    project = a_project(session)
    job = calibrated(session, project, status="uploaded", validation=None)
    plain, checked = a_job(session, project), calibrated(session, project)
    assert admission.consider(session, job.id) == "waiting"
    assert set(admission.find_ready(session)) == {plain.id, checked.id}
    assert admission.consider(session, checked.id) == "queued"


def test_bad_calibration_rows_fail_the_job_and_name_the_field(session: Session) -> None:
    job = calibrated(session, a_project(session), status="error", status_details="the file has no rows")
    assert admission.consider(session, job.id) == "failed"
    session.refresh(job)
    assert job.error is not None
    assert (job.error["code"], job.error["param"]) == ("invalid_training_file", "lora.init.calibration_file")


@pytest.mark.parametrize("on_row_error", ["fail", "skip"])
def test_a_file_with_bad_rows_is_refused_or_used_as_asked(session: Session, on_row_error: str) -> None:
    project = a_project(session)
    report = {"kind": "chat", "rows": 20, "valid_rows": 19, "error_count": 1}
    file = a_file(session, project, validation=report, status_details="1 of 20 rows is invalid; first: line 3: x")
    job = a_job(session, project, file=file, on_row_error=on_row_error)
    assert admission.consider(session, job.id) == ("failed" if on_row_error == "fail" else "queued")
    session.refresh(job)
    if on_row_error == "fail":
        assert job.error is not None
        assert job.error["code"] == "invalid_training_file"
        assert job.error["param"] == "training_file"
        assert "line 3" in job.error["message"]


def test_a_queued_job_is_announced_once_then_left_alone(session: Session) -> None:
    job = a_queued_job(session, a_project(session))
    assert notify.find_unannounced(session) == [(job.id, "train")]
    notify.mark_notified(session, job.id)
    assert notify.find_unannounced(session) == []


def test_a_lost_message_is_rung_again_only_while_a_worker_is_free(session: Session) -> None:
    project = a_project(session)
    job = a_queued_job(session, project)
    session.execute(update(Job).where(Job.id == job.id).values(notified_at=datetime.now(UTC) - timedelta(minutes=1)))
    patience = timedelta(seconds=15)
    assert notify.find_lost(session, older_than=patience) == []
    a_worker(session, slots=1)
    assert notify.find_lost(session, older_than=patience) == [(job.id, "train")]
    assert jobs.claim(session, "w", lease_seconds=30)
    waiting = a_queued_job(session, project)
    session.execute(
        update(Job).where(Job.id == waiting.id).values(notified_at=datetime.now(UTC) - timedelta(minutes=1))
    )
    assert notify.find_lost(session, older_than=patience) == []
