"""Pausing and resuming, in every state: what moves, what stays, what is refused and why."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from api.core.db.tables import Event, File, Job, Project
from api.core.errors import QuotaExceeded, WrongState
from api.core.jobs import admission, checkpoints, jobs, pauses
from api.core.jobs.jobs import Failure, Lease
from api.core.queue import notify
from api.core.settings import get_settings
from tests.things import a_file, a_job, a_project, a_queued_job, a_running_job


def statuses(session: Session, job: Job) -> list[str | None]:
    """The statuses a job's events tell, each after the one that the next calls `previous`."""
    rows = session.scalars(select(Event).where(Event.job_id == job.id).order_by(Event.sequence)).all()
    told = [row.data for row in rows if row.data.get("kind") == "status"]
    assert [data["previous"] for data in told[1:]] == [data["status"] for data in told[:-1]]
    return [data["status"] for data in told]


def a_pausing_job(session: Session) -> tuple[Job, Lease]:
    job, lease = a_running_job(session, a_project(session))
    return pauses.pause(session, job), lease


def a_checkpoint(session: Session, job: Job, step: int = 5) -> None:
    file = a_file(session, a_project(session), purpose="fine-tune-results")
    checkpoints.add(session, job, step=step, metrics={"step": step}, file=file, state_key="s")


def a_failed_job(session: Session, code: str) -> Job:
    job, lease = a_running_job(session, a_project(session))
    jobs.fail(session, lease, Failure(code, "No."))
    session.refresh(job)
    return job


# --- pause --------------------------------------------------------------------------------------


def test_a_waiting_job_is_paused_at_once_and_not_claimed(session: Session) -> None:
    job = pauses.pause(session, a_queued_job(session, a_project(session)))
    assert (job.status, job.finished_at) == ("paused", None)
    assert jobs.claim(session, "w", lease_seconds=30) == []
    assert notify.find_unannounced(session) == []


def test_a_run_is_asked_to_pause_and_goes_on_holding_its_job(session: Session) -> None:
    job, lease = a_pausing_job(session)
    assert (job.status, job.shown_status) == ("running", "pausing")
    assert pauses.is_pause_requested(session, lease)
    assert jobs.renew_lease(session, lease, lease_seconds=30)


def test_nobody_is_asked_to_pause_before_somebody_asks(session: Session) -> None:
    _, lease = a_running_job(session, a_project(session))
    assert not pauses.is_pause_requested(session, lease)


def test_a_job_given_back_while_pausing_is_paused_and_has_lost_no_attempt(session: Session) -> None:
    job, lease = a_pausing_job(session)
    assert jobs.release(session, lease, "The run was stopped for a pause")
    session.refresh(job)
    assert (job.status, job.shown_status, job.attempts, job.lease_owner) == ("paused", "paused", 0, None)
    assert statuses(session, job)[-3:] == ["running", "pausing", "paused"]


def test_a_pausing_job_whose_worker_is_lost_is_paused_too(session: Session) -> None:
    job, lease = a_pausing_job(session)
    session.execute(update(Job).values(lease_until=datetime.now(UTC) - timedelta(seconds=1)))
    jobs.recover_lost_runs(session, max_attempts=3)
    session.refresh(job)
    assert (job.status, job.lost_runs) == ("paused", 1)
    assert not jobs.renew_lease(session, lease, lease_seconds=30)


def test_a_run_that_ends_before_it_pauses_has_ended(session: Session) -> None:
    job, lease = a_pausing_job(session)
    assert jobs.fail(session, lease, Failure("non_finite_loss", "No."))
    session.refresh(job)
    assert (job.status, job.shown_status) == ("failed", "failed")
    assert statuses(session, job)[-2:] == ["pausing", "failed"]


@pytest.mark.parametrize("state", ["pausing", "paused"])
def test_pausing_twice_changes_nothing(session: Session, state: str) -> None:
    job, _ = a_pausing_job(session) if state == "pausing" else (a_queued_job(session, a_project(session)), None)
    before = statuses(session, pauses.pause(session, job))
    assert statuses(session, pauses.pause(session, job)) == before
    assert job.shown_status == state


@pytest.mark.parametrize("verb", [pauses.pause, pauses.resume])
def test_a_cancelled_job_can_be_neither_paused_nor_resumed(session: Session, verb: object) -> None:
    job = jobs.cancel(session, a_queued_job(session, a_project(session)))
    with pytest.raises(WrongState, match="already been cancelled") as caught:
        verb(session, job)  # type: ignore[operator]
    assert caught.value.code == "invalid_job_state"


def test_a_failed_job_is_not_resumed_where_as_many_wait_as_may(
    session: Session, environment: pytest.MonkeyPatch
) -> None:
    job = a_failed_job(session, "worker_lost")
    a_checkpoint(session, job)
    a_queued_job(session, session.get_one(Project, job.project_id))
    environment.setenv("LORAINIT_PROJECT_QUEUED", "1")
    get_settings.cache_clear()
    with pytest.raises(QuotaExceeded, match="1 jobs of this project are waiting") as caught:
        pauses.resume(session, job)
    assert (caught.value.code, job.status) == ("queue_full", "failed")
    environment.setenv("LORAINIT_PROJECT_QUEUED", "2")
    get_settings.cache_clear()
    assert pauses.resume(session, job).status == "queued"


def test_a_paused_job_is_among_those_that_wait_and_resumed(session: Session, environment: pytest.MonkeyPatch) -> None:
    job = pauses.pause(session, a_queued_job(session, a_project(session)))
    environment.setenv("LORAINIT_PROJECT_QUEUED", "1")
    get_settings.cache_clear()
    assert pauses.resume(session, job).status == "queued"


@pytest.mark.parametrize("state", ["pausing", "paused"])
def test_a_pausing_or_paused_job_can_be_cancelled(session: Session, state: str) -> None:
    job, lease = a_pausing_job(session)
    if state == "paused":
        jobs.release(session, lease, "Stopped")
    jobs.cancel(session, job)
    assert (job.status, job.pause_requested) == ("cancelled", False)
    assert statuses(session, job)[-2:] == [state, "cancelled"]
    assert not jobs.renew_lease(session, lease, lease_seconds=30)


# --- resume -------------------------------------------------------------------------------------


def test_a_resumed_job_queues_anew_and_is_announced(session: Session) -> None:
    project = a_project(session)
    job, other = a_queued_job(session, project), a_queued_job(session, project)
    notify.mark_notified(session, job.id)
    pauses.resume(session, pauses.pause(session, job))
    assert job.status == "queued"
    assert [notification.job_id for notification in notify.find_unannounced(session)] == [other.id, job.id]


def test_a_job_paused_before_its_files_were_checked_is_checked_first(session: Session) -> None:
    job = pauses.pause(session, a_job(session, a_project(session)))
    assert admission.consider(session, job.id) == "waiting"
    assert pauses.resume(session, job).status == "validating_files"
    assert admission.consider(session, job.id) == "queued"


@pytest.mark.parametrize("state", ["validating_files", "queued", "running"])
def test_resuming_a_job_that_is_not_paused_changes_nothing(session: Session, state: str) -> None:
    project = a_project(session)
    make = {"validating_files": a_job, "queued": a_queued_job, "running": lambda *of: a_running_job(*of)[0]}[state]
    job = make(session, project)
    before = statuses(session, job)
    assert pauses.resume(session, job).status == state
    assert statuses(session, job) == before


def test_a_job_that_is_still_pausing_cannot_be_resumed(session: Session) -> None:
    job, _ = a_pausing_job(session)
    with pytest.raises(WrongState, match="still pausing") as caught:
        pauses.resume(session, job)
    assert caught.value.code == "invalid_job_state"


def test_a_failed_job_goes_on_from_its_checkpoint_as_if_it_had_not_failed(session: Session) -> None:
    job = a_failed_job(session, "worker_lost")
    a_checkpoint(session, job, 5)
    pauses.resume(session, job)
    assert (job.status, job.error, job.finished_at, job.lost_runs) == ("queued", None, None, 0)
    assert statuses(session, job)[-2:] == ["failed", "queued"]


@pytest.mark.parametrize(
    ("code", "has_checkpoint", "file_is_gone", "why"),
    [
        ("non_finite_loss", True, False, "the same job would fail again with non_finite_loss"),
        ("worker_lost", False, False, "there is no checkpoint to go on from"),
        ("worker_lost", True, True, "a file it was trained on has been deleted"),
    ],
)
def test_what_cannot_be_resumed_says_why(
    session: Session, code: str, has_checkpoint: bool, file_is_gone: bool, why: str
) -> None:
    job = a_failed_job(session, code)
    if has_checkpoint:
        a_checkpoint(session, job)
    if file_is_gone:
        session.execute(update(File).where(File.id == job.training_file_id).values(deleted_at=datetime.now(UTC)))
    prospect = pauses.check_resumable(session, [job])[job.id]
    assert (prospect.possible, prospect.from_step, prospect.reason) == (False, None, why)
    with pytest.raises(WrongState, match=why) as caught:
        pauses.resume(session, job)
    assert caught.value.code == "job_not_resumable"


@pytest.mark.parametrize("step", [None, 5])
def test_a_paused_job_says_from_where_it_will_go_on(session: Session, step: int | None) -> None:
    job, lease = a_pausing_job(session)
    if step is not None:
        a_checkpoint(session, job, step)
    jobs.release(session, lease, "Stopped")
    session.refresh(job)
    assert pauses.check_resumable(session, [job])[job.id] == pauses.Resumability(
        possible=True, from_step=step, reason=None
    )
