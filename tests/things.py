"""Rows for tests: a project, a file, a job, each valid as it stands and changed by keyword."""

from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy.orm import Session

from api.core.db.tables import Adapter, File, Job, Project, Worker
from api.core.ids import new_id
from api.core.jobs import jobs
from lorainit.config.spec import Hyperparameters, Lora

# For a test that asks the database only what other tests ask both kinds: twice would say nothing new.
ON_ONE_DATABASE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
# For a test of a whole service, of whose kind others run on SQLite.
ON_POSTGRESQL = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
MODEL = "smollm2-135m-instruct"
CHECKED = {
    "kind": "chat",
    "rows": 20,
    "valid_rows": 20,
    "error_count": 0,
    "warning_count": 0,
    "errors": [],
    "warnings": [],
}


def a_project(session: Session, name: str = "lab") -> Project:
    project = Project(id=new_id("proj_", 16), name=f"{name}-{new_id('', 8)}", created_at=datetime.now(UTC))
    session.add(project)
    session.flush()
    return project


def a_file(session: Session, project: Project, **changes: Any) -> File:
    values: dict[str, Any] = {
        "id": new_id("file-"),
        "project_id": project.id,
        "purpose": "fine-tune",
        "filename": "train.jsonl",
        "bytes": 10,
        "sha256": "0" * 64,
        "storage_key": f"files/{new_id('', 8)}",
        "status": "processed",
        "status_details": None,
        "validation": CHECKED,
        "created_at": datetime.now(UTC),
        **changes,
    }
    file = File(**values)
    session.add(file)
    session.flush()
    return file


def a_job(session: Session, project: Project, *, file: File | None = None, **changes: Any) -> Job:
    """A job in `validating_files`."""
    lora, _ = Lora(target_modules=["q_proj"]).resolve()
    values: dict[str, Any] = {
        "id": new_id("ftjob-"),
        "project_id": project.id,
        "created_at": datetime.now(UTC),
        "status": "validating_files",
        "model": MODEL,
        "training_file_id": (file or a_file(session, project)).id,
        "seed": 7,
        "integrations": [],
        "recipe": {"lora": lora.model_dump(mode="json"), "training": Hyperparameters().model_dump(mode="json")},
        "choices": [],
        "priority": 0,
        "on_row_error": "fail",
        "deterministic": True,
        "wants_group": False,
        "lease_token": 0,
        "attempts": 0,
        "event_count": 0,
        **changes,
    }
    return jobs.create(session, Job(**values))


def a_queued_job(session: Session, project: Project, **changes: Any) -> Job:
    job = a_job(session, project, **changes)
    assert jobs.admit(session, job.id, recipe=job.recipe, choices=[], group_key=job.group_key)
    session.refresh(job)
    return job


def a_running_job(session: Session, project: Project, **changes: Any) -> tuple[Job, jobs.Lease]:
    a_queued_job(session, project, **changes)
    (job,) = jobs.claim(session, "worker:1", lease_seconds=30)
    return job, jobs.Lease(job.id, job.lease_token)


def an_adapter(session: Session, project: Project, name: str, **changes: Any) -> Adapter:
    """The adapter of a job that has succeeded."""
    job = a_job(session, project, file=changes.pop("file", None))
    job.status, job.finished_at = "succeeded", datetime.now(UTC)
    adapter = Adapter(
        job_id=job.id,
        project_id=project.id,
        name=name,
        file_id=a_file(session, project).id,
        rank=16,
        **{"created_at": datetime.now(UTC), **changes},
    )
    session.add(adapter)
    session.flush()
    return adapter


def a_worker(
    session: Session, *, slots: int = 1, queues: tuple[str, ...] = ("train",), seen_at: datetime | None = None
) -> Worker:
    at = datetime.now(UTC)
    worker = Worker(id=new_id("host:", 6), slots=slots, queues=list(queues), started_at=at, seen_at=seen_at or at)
    session.add(worker)
    session.flush()
    return worker
