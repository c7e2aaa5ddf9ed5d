"""What a job has said of a file's rows goes with the file."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from api.core.db.tables import Event, Job
from api.core.jobs import events, jobs
from api.core.jobs.jobs import Failure
from api.core.maintenance import redaction
from tests.things import a_file, a_job, a_project

WORD = "swordfish"
PROBLEM = {"line": 3, "code": "message_unrecognized_key", "param": WORD, "message": f"Line 3: '{WORD}' is not a key."}


def say(session: Session, job: Job, text: str, /, **data: Any) -> None:
    events.append(session, job.id, text, at=datetime.now(UTC), data={"kind": "data", **data})


def story(session: Session, job: Job) -> str:
    rows = session.scalars(select(Event).where(Event.job_id == job.id).order_by(Event.sequence)).all()
    return "\n".join(f"{row.message} {row.data}" for row in rows)


def test_remarks_and_lists_of_bad_rows_lose_what_they_quote(session: Session) -> None:
    project = a_project(session)
    training, validation = a_file(session, project), a_file(session, project)
    job = a_job(session, project, file=training, validation_file_id=validation.id)
    say(session, job, "19 of 20 rows are used", file="training_file", errors=[PROBLEM], rows=20)
    say(session, job, PROBLEM["message"], file="training_file", rows=1, **PROBLEM)
    say(session, job, f"of the other file: {WORD}-2", file="validation_file", rows=1, **PROBLEM)
    redaction.redact_quotes(session, [training.id])
    session.flush()
    told = story(session, job)
    assert told.count(WORD) == 3  # of the other file: in its message, and twice in its data
    assert "19 of 20 rows are used" in told and "message_unrecognized_key" in told and "'rows': 20" in told
    redaction.redact_quotes(session, [validation.id])
    session.flush()
    assert WORD not in story(session, job)


def test_the_error_of_a_job_loses_what_it_quotes_and_keeps_its_code(session: Session) -> None:
    project = a_project(session)
    training = a_file(session, project)
    job = a_job(session, project, file=training)
    jobs.reject(session, job.id, Failure("invalid_training_file", f"first: line 3: {WORD}", "training_file"))
    session.refresh(job)
    redaction.redact_quotes(session, [training.id])
    session.flush()
    session.refresh(job)
    assert job.error == {"code": "invalid_training_file", "message": redaction.REMOVED, "param": "training_file"}
    assert WORD not in story(session, job)


def test_an_error_that_is_not_about_the_file_stays(session: Session) -> None:
    project = a_project(session)
    training = a_file(session, project)
    job = a_job(session, project, file=training)
    jobs.reject(session, job.id, Failure("out_of_memory", "The device ran out of memory."))
    redaction.redact_quotes(session, [training.id])
    session.flush()
    session.refresh(job)
    assert job.error is not None and job.error["message"] == "The device ran out of memory."


def test_another_projects_jobs_are_left_alone(session: Session) -> None:
    training = a_file(session, a_project(session))
    other = a_project(session, "others")
    job = a_job(session, other)
    say(session, job, WORD, file="training_file", **PROBLEM)
    redaction.redact_quotes(session, [training.id])
    session.flush()
    assert WORD in story(session, job)
