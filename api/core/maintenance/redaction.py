"""Removes quotes of a deleted file's rows from the errors and events of jobs.

An event keeps its number, its code and its figures. Only text that quoted rows is replaced. Texts quote rows at all
because "'contnet' is not a key of a message" is what helps to mend a file (docs/decisions/0039). Nothing here commits.
"""

from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from api.core.db.tables import Event, File, Job

REMOVED = "This text quoted a file that has been deleted since."
# The message quotes the first row of a file when a base's template or tokenizer could read none of them.
_OF_ANY_FILE = ("unsupported_model",)


def redact_quotes(session: Session, file_ids: Collection[str]) -> None:
    """Remove quotes of these files from errors and events of the jobs that used them.

    Safe to repeat, because a crash before the files are noted as cleared does it again.
    """
    # Jobs are looked up by their project, too, because they are indexed by it and not by their files.
    projects = select(File.project_id).where(File.id.in_(file_ids), File.purpose != "fine-tune-results")
    used = or_(
        Job.training_file_id.in_(file_ids),
        Job.validation_file_id.in_(file_ids),
        Job.calibration_file_id.in_(file_ids),
    )
    for job in session.scalars(select(Job).where(Job.project_id.in_(projects), used)).all():
        _redact_job(session, job, _fields(job, file_ids))


def _fields(job: Job, file_ids: Collection[str]) -> set[str]:
    """The fields of the job that name one of these files."""
    named = {
        "training_file": job.training_file_id,
        "validation_file": job.validation_file_id,
        "lora.init.calibration_file": job.calibration_file_id,
    }
    return {field for field, file_id in named.items() if file_id in file_ids}


def _redact_job(session: Session, job: Job, fields: set[str]) -> None:
    if job.error is not None and _quotes(job.error, fields):
        job.error = {**job.error, "message": REMOVED}
    about = Event.data["file"].as_string().in_(fields), Event.data["error"]["code"].as_string().is_not(None)
    for event in session.scalars(select(Event).where(Event.job_id == job.id, or_(*about))).all():
        error = event.data.get("error")
        if isinstance(error, dict) and _quotes(error, fields):
            event.message = f"The job failed: {REMOVED}"
            event.data = {**event.data, "error": {**error, "message": REMOVED}}
        elif event.data.get("file") in fields:
            _redact_event(event)


def _quotes(error: Mapping[str, Any], fields: set[str]) -> bool:
    return error.get("param") in fields or error.get("code") in _OF_ANY_FILE


def _redact_event(event: Event) -> None:
    """Empty a list of bad rows. A single warning keeps its code and its count."""
    data = event.data
    if "message" in data:
        event.message = REMOVED
        data = {**data, "message": REMOVED, "param": None}
    event.data = {**data, "errors": []} if "errors" in data else data
