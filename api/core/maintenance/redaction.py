"""What jobs say of the rows of a file goes with the file: errors and events that quote them are put in other words.

An event keeps its place, its code and its numbers; what it quoted is gone. Nothing here commits.
"""

from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from api.core.db.tables import Event, File, Job

REMOVED = "What was said here quoted a file that has been deleted since."
# Said of a base whose template or tokenizer reads no row of a file, with the first of the rows.
_OF_ANY_FILE = ("unsupported_model",)


def redact_quotes(session: Session, file_ids: Collection[str]) -> None:
    """Take the quotes of these files out of what the jobs that used them have said. Safe to repeat."""
    projects = select(File.project_id).where(File.id.in_(file_ids), File.purpose != "fine-tune-results")
    used = or_(
        Job.training_file_id.in_(file_ids),
        Job.validation_file_id.in_(file_ids),
        Job.calibration_file_id.in_(file_ids),
    )
    for job in session.scalars(select(Job).where(Job.project_id.in_(projects), used)).all():
        _forget(session, job, _fields(job, file_ids))


def _fields(job: Job, file_ids: Collection[str]) -> set[str]:
    """The fields of an order that named one of these files."""
    named = {
        "training_file": job.training_file_id,
        "validation_file": job.validation_file_id,
        "lora.init.calibration_file": job.calibration_file_id,
    }
    return {field for field, file_id in named.items() if file_id in file_ids}


def _forget(session: Session, job: Job, fields: set[str]) -> None:
    if job.error is not None and _quotes(job.error, fields):
        job.error = {**job.error, "message": REMOVED}
    about = Event.data["file"].as_string().in_(fields), Event.data["error"]["code"].as_string().is_not(None)
    for event in session.scalars(select(Event).where(Event.job_id == job.id, or_(*about))).all():
        error = event.data.get("error")
        if isinstance(error, dict) and _quotes(error, fields):
            event.message = f"The job failed: {REMOVED}"
            event.data = {**event.data, "error": {**error, "message": REMOVED}}
        elif event.data.get("file") in fields:
            _forget_remarks(event)


def _quotes(error: Mapping[str, Any], fields: set[str]) -> bool:
    return error.get("param") in fields or error.get("code") in _OF_ANY_FILE


def _forget_remarks(event: Event) -> None:
    """A list of bad rows is emptied; one remark keeps its code and how often it was made."""
    data = event.data
    if "message" in data:
        event.message = REMOVED
        data = {**data, "message": REMOVED, "param": None}
    event.data = {**data, "errors": []} if "errors" in data else data
