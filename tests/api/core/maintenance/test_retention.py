"""Retention: what is nobody's goes, row first; what somebody needs stays."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from api.core.db.tables import Adapter, Checkpoint, Event, File, Job, JobLabel, Metric
from api.core.errors import NotFound
from api.core.jobs import checkpoints, jobs, metrics, pauses
from api.core.maintenance import retention
from tests.things import a_file, a_job, a_project, a_queued_job, a_running_job

PAST = datetime.now(UTC) - timedelta(days=40)


def a_checkpoint(session: Session, job: Job, step: int, *, loss: float | None = None) -> Checkpoint:
    file = a_file(session, a_project(session), purpose="fine-tune-results", storage_key=f"jobs/{job.id}/{step}.tar")
    key = f"jobs/{job.id}/{step}-state.tar"
    return checkpoints.add(session, job, step=step, metrics={"full_valid_loss": loss}, file=file, state_key=key)


def kept(session: Session, job: Job) -> list[int]:
    rows = checkpoints.list_page(session, job.id, after=None, limit=100)[0]
    return [row.step for row in rows]


def end(session: Session, job: Job, at: datetime) -> None:
    jobs.cancel(session, job)
    session.execute(update(Job).where(Job.id == job.id).values(finished_at=at))


def test_a_file_past_its_time_is_deleted_and_others_are_not(session: Session) -> None:
    project = a_project(session)
    old = a_file(session, project, expires_at=PAST)
    a_file(session, project, expires_at=datetime.now(UTC) + timedelta(hours=1))
    a_file(session, project)
    assert retention.expire_files(session) == [old.id]
    assert retention.expire_files(session) == []


@pytest.mark.parametrize("make", [a_job, a_queued_job, lambda *a, **k: a_running_job(*a, **k)[0]])
@pytest.mark.parametrize("use", ["training", "validation", "calibration"])
def test_an_expired_file_stays_until_the_job_that_needs_it_has_ended(session: Session, make: Any, use: str) -> None:
    project = a_project(session)
    file = a_file(session, project, expires_at=PAST)
    job = make(session, project, **_naming(session, project, file, use))
    assert retention.expire_files(session) == []
    jobs.cancel(session, session.get_one(Job, job.id))
    assert retention.expire_files(session) == [file.id]


def _naming(session: Session, project: Any, file: File, use: str) -> dict[str, Any]:
    if use == "training":
        return {"file": file}
    if use == "validation":
        return {"validation_file_id": file.id}
    recipe = a_job(session, project).recipe
    init = {"method": "lora_one", "calibration_file": file.id}
    return {"recipe": {**recipe, "lora": {**recipe["lora"], "init": init}}}


def test_checkpoints_go_only_some_days_after_their_job_has_ended(session: Session) -> None:
    project = a_project(session)
    ended, open_, fresh = (a_running_job(session, project)[0] for _ in range(3))
    for job in (ended, open_, fresh):
        a_checkpoint(session, job, 1)
    end(session, ended, PAST)
    end(session, fresh, datetime.now(UTC))
    assert len(retention.delete_checkpoints(session, days=30)) == 1
    assert [kept(session, job) for job in (ended, open_, fresh)] == [[], [1], [1]]


def test_the_last_few_checkpoints_and_the_best_one_are_kept(session: Session) -> None:
    job, _ = a_running_job(session, a_project(session))
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5), (5, None)):
        a_checkpoint(session, job, step, loss=loss)
        checkpoints.supersede(session, job.id, keep=2)
    assert kept(session, job) == [5, 4, 2]


def test_the_bytes_of_a_superseded_checkpoint_are_to_be_cleared_with_its_file(session: Session) -> None:
    job, _ = a_running_job(session, a_project(session))
    for step in (1, 2):
        a_checkpoint(session, job, step)
    checkpoints.supersede(session, job.id, keep=1)
    assert [key for _, key in retention.find_uncleared(session, Checkpoint)] == [f"jobs/{job.id}/1-state.tar"]
    assert [key for _, key in retention.find_uncleared(session, File)] == [f"jobs/{job.id}/1.tar"]


def test_what_was_cleared_is_not_found_again(session: Session) -> None:
    file = a_file(session, a_project(session), deleted_at=PAST)
    assert retention.find_uncleared(session, File) == [(file.id, file.storage_key)]
    retention.mark_cleared(session, File, [file.id])
    assert retention.find_uncleared(session, File) == []


def test_a_checkpoint_stored_twice_keeps_the_bytes_both_rows_name(session: Session) -> None:
    # The commit went through and its answer was lost, so that the same attempt stored the step again.
    job, _ = a_running_job(session, a_project(session))
    a_checkpoint(session, job, 1)
    a_checkpoint(session, job, 1)
    keys = [key for _, key in retention.find_uncleared(session, File)]
    assert keys == [f"jobs/{job.id}/1.tar"]
    assert retention.find_unreferenced(session, keys) == set()


def test_an_orphan_is_an_object_of_ours_that_no_row_names(session: Session) -> None:
    job, _ = a_running_job(session, a_project(session))
    row = a_checkpoint(session, job, 1)
    named = [row.state_key, session.scalar(select(File.storage_key).where(File.id == row.file_id)) or ""]
    lost = [f"jobs/{job.id}/attempt-1/adapter.tar", f"files/{job.project_id}/file-gone"]
    assert retention.find_orphans(session, [*named, *lost]) == set(lost)


def test_objects_of_another_database_are_left_alone(session: Session) -> None:
    foreign = ["files/proj_other/file-1", "jobs/ftjob-other/attempt-1/adapter.tar", "backup/x", "jobs", "files/x"]
    assert retention.find_orphans(session, foreign) == set()


# --- jobs themselves ------------------------------------------------------------------------------


def an_ended_job(session: Session, *, at: datetime = PAST) -> Job:
    """With metadata, a metric, a checkpoint and a result file."""
    job, lease = a_running_job(session, a_project(session), labels={"team": "a"})
    metrics.save_steps(session, job.id, lease.token, [(1, {"train_loss": 2.0})], at=at)
    a_checkpoint(session, job, 1)
    end(session, job, at)
    file = a_file(session, a_project(session), purpose="fine-tune-results", storage_key=f"jobs/{job.id}/metrics.csv")
    metrics.attach_csv(session, job.id, file)
    return session.get_one(Job, job.id, populate_existing=True)


def a_model(session: Session, job: Job) -> Adapter:
    file = a_file(session, a_project(session), purpose="fine-tune-results")
    at = datetime.now(UTC)
    adapter = Adapter(job_id=job.id, project_id=job.project_id, name=job.id, file_id=file.id, rank=4, created_at=at)
    session.add(adapter)
    session.flush()
    return adapter


def forget(session: Session, *, days: float = 30) -> list[str]:
    """Both steps, with the bytes cleared in between; who was removed."""
    retention.retire_jobs(session, days=days)
    for kind in (File, Checkpoint):
        retention.mark_cleared(session, kind, [row_id for row_id, _ in retention.find_uncleared(session, kind)])
    return retention.remove_jobs(session, days=days)


def test_a_job_long_ended_goes_with_its_events_metrics_checkpoints_and_labels(session: Session) -> None:
    job = an_ended_job(session)
    result = session.get_one(File, job.result_file_id)
    assert forget(session) == [job.id]
    for table in (Event, Metric, Checkpoint, JobLabel):
        assert session.scalar(select(func.count()).where(table.job_id == job.id)) == 0
    session.expire_all()
    assert session.get(Job, job.id) is None
    assert result.deleted_at is not None  # its row stays, as that of every deleted file


def test_a_job_stays_while_it_is_open_fresh_or_its_model_is_there(session: Session) -> None:
    open_, _ = a_running_job(session, a_project(session))
    a_checkpoint(session, open_, 1)
    fresh, used = an_ended_job(session, at=datetime.now(UTC)), an_ended_job(session)
    a_model(session, used)
    assert forget(session) == []
    assert [kept(session, job) for job in (open_, fresh, used)] == [[1], [1], [1]]


def test_a_job_whose_model_was_deleted_goes_too(session: Session) -> None:
    job = an_ended_job(session)
    a_model(session, job).deleted_at = PAST
    assert forget(session) == [job.id]
    assert session.scalar(select(func.count()).where(Adapter.job_id == job.id)) == 0


def test_a_job_stays_until_the_bytes_of_its_checkpoints_are_gone(session: Session) -> None:
    job = an_ended_job(session)
    assert retention.retire_jobs(session, days=30) == [job.id]
    assert retention.retire_jobs(session, days=30) == []
    assert retention.remove_jobs(session, days=30) == []
    assert forget(session) == [job.id]


@pytest.mark.parametrize("move", [jobs.cancel, pauses.pause, pauses.resume])
def test_a_job_removed_between_two_looks_is_not_found(session: Session, move: Any) -> None:
    job = a_job(session, a_project(session))
    session.execute(delete(Event).where(Event.job_id == job.id))
    session.execute(delete(Job).where(Job.id == job.id).execution_options(synchronize_session=False))
    with pytest.raises(NotFound, match=job.id):
        move(session, job)


def test_a_result_file_that_comes_too_late_for_its_job_is_deleted(session: Session) -> None:
    file = a_file(session, a_project(session), id="file-late", purpose="fine-tune-results")
    metrics.attach_csv(session, "ftjob-removed", file)
    assert file.deleted_at is not None
