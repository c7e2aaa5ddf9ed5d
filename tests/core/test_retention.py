"""Retention: what is nobody's goes, row first; what somebody needs stays."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from api.core import checkpoints, jobs, retention
from api.core.models import Checkpoint, File, Job
from tests.things import a_file, a_job, a_project, a_queued_job, a_running_job

PAST = datetime.now(UTC) - timedelta(days=40)


def a_checkpoint(session: Session, job: Job, step: int, *, loss: float | None = None) -> Checkpoint:
    file = a_file(session, a_project(session), purpose="fine-tune-results", storage_key=f"jobs/{job.id}/{step}.tar")
    key = f"jobs/{job.id}/{step}-state.tar"
    return checkpoints.add(session, job, step=step, metrics={"full_valid_loss": loss}, file=file, state_key=key)


def kept(session: Session, job: Job) -> list[int]:
    rows = checkpoints.page(session, job.id, after=None, limit=100)[0]
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
    assert len(retention.forget_checkpoints(session, days=30)) == 1
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
    assert [key for _, key in retention.uncleared(session, Checkpoint)] == [f"jobs/{job.id}/1-state.tar"]
    assert [key for _, key in retention.uncleared(session, File)] == [f"jobs/{job.id}/1.tar"]


def test_what_was_cleared_is_not_found_again(session: Session) -> None:
    file = a_file(session, a_project(session), deleted_at=PAST)
    assert retention.uncleared(session, File) == [(file.id, file.storage_key)]
    retention.mark_cleared(session, File, [file.id])
    assert retention.uncleared(session, File) == []


def test_a_checkpoint_stored_twice_keeps_the_bytes_both_rows_name(session: Session) -> None:
    # The commit went through and its answer was lost, so that the same attempt stored the step again.
    job, _ = a_running_job(session, a_project(session))
    a_checkpoint(session, job, 1)
    a_checkpoint(session, job, 1)
    keys = [key for _, key in retention.uncleared(session, File)]
    assert keys == [f"jobs/{job.id}/1.tar"]
    assert retention.unnamed(session, keys) == set()


def test_an_orphan_is_an_object_of_ours_that_no_row_names(session: Session) -> None:
    job, _ = a_running_job(session, a_project(session))
    row = a_checkpoint(session, job, 1)
    named = [row.state_key, session.scalar(select(File.storage_key).where(File.id == row.file_id)) or ""]
    lost = [f"jobs/{job.id}/attempt-1/adapter.tar", f"files/{job.project_id}/file-gone"]
    assert retention.orphans(session, [*named, *lost]) == set(lost)


def test_objects_of_another_database_are_left_alone(session: Session) -> None:
    foreign = ["files/proj_other/file-1", "jobs/ftjob-other/attempt-1/adapter.tar", "backup/x", "jobs", "files/x"]
    assert retention.orphans(session, foreign) == set()
