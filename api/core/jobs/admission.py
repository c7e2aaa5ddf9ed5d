"""From `validating_files` to `queued`: checks the files of a job and resolves its "auto" values.

The web process calls `consider` right after it accepted a job, because most files are checked by then. The
reconciler calls it for all others. Either may come first or twice, because every change is a compare-and-set on the
status. Nothing here commits.
"""

from collections.abc import Sequence
from typing import Literal

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from api.core.db.tables import File, Job, has_status, is_unchecked
from api.core.errors import Refusal
from api.core.fields import translate_choice, translate_field
from api.core.jobs import jobs
from api.core.jobs.jobs import Failure
from api.core.jobs.submit import CALIBRATION_FILE, error_code
from api.core.models import catalogue
from api.core.queue import groups
from lorainit.config.errors import LorainitError
from lorainit.config.resolve import resolve
from lorainit.config.spec import Hyperparameters, Lora

Decision = Literal["queued", "failed", "waiting", "trying"]


def find_ready(session: Session, *, limit: int = 100) -> Sequence[str]:
    """Ids of jobs whose files have all been checked, oldest first. Those for which candidates are tried are not."""
    unchecked = select(File.id).where(is_unchecked())
    return session.scalars(
        select(Job.id)
        .where(
            has_status(Job, "validating_files"),
            Job.finished_at.is_(None),  # so that the partial index is used
            Job.training_file_id.not_in(unchecked),
            or_(Job.validation_file_id.is_(None), Job.validation_file_id.not_in(unchecked)),
            or_(Job.calibration_file_id.is_(None), Job.calibration_file_id.not_in(unchecked)),
            or_(Job.experiment_id.is_(None), Job.recipe["lora"]["init"]["method"].as_string() != "auto"),
        )
        .order_by(Job.created_at)
        .limit(limit)
    ).all()


def has_automatic_init(job: Job) -> bool:
    """Whether the initialization of a job has still to be chosen (`api.core.experiments.auto`)."""
    found: bool = job.recipe["lora"]["init"]["method"] == "auto"
    return found


def has_usable_files(session: Session, job: Job) -> bool:
    """Whether all files of a job have been checked and can be used."""
    files = _find_files(session, job)
    checked = all(file.status != "uploaded" for file in files.values())
    return checked and not any(_find_failure(file, field, job) for field, file in files.items())


def consider(session: Session, job_id: str) -> Decision:
    """Admit or reject a job whose files have been checked; "waiting" while one has not, or its init is not chosen.

    A file is looked at again, although `submit` has done so, because it may have been deleted or checked since.
    """
    job = session.get(Job, job_id)
    if job is None or job.status != "validating_files":
        return "waiting"
    files = _find_files(session, job)
    if any(file.status == "uploaded" for file in files.values()):
        return "waiting"
    failures = (_find_failure(file, field, job) for field, file in files.items())
    failure = next((found for found in failures if found), None)
    if failure is None and has_automatic_init(job):
        return "waiting"
    if failure is None:
        failure = _resolve(session, job, rows=(files["training_file"].validation or {})["valid_rows"])
    if failure is None:
        return "queued"
    jobs.reject(session, job.id, failure)
    return "failed"


def _find_files(session: Session, job: Job) -> dict[str, File]:
    """The files of a job by the field that names them."""
    named = {
        "training_file": job.training_file_id,
        "validation_file": job.validation_file_id,
        CALIBRATION_FILE: job.calibration_file_id,
    }
    return {field: session.get_one(File, file_id) for field, file_id in named.items() if file_id}


def _resolve(session: Session, job: Job, *, rows: int) -> Failure | None:
    lora = Lora.model_validate(job.recipe["lora"])
    training = Hyperparameters.model_validate(job.recipe["training"])
    try:
        base = catalogue.require(job.model)
        training, choices = resolve(training, rows=rows, model=base.reference(), method=lora.method)
    except (Refusal, LorainitError) as refusal:
        return make_failure(refusal)
    recipe = {"lora": job.recipe["lora"], "training": training.model_dump(mode="json")}
    all_choices = [*job.choices, *(translate_choice(choice.model_dump(mode="json")) for choice in choices)]
    key = (
        groups.compute_group_key(base, lora, training=training, deterministic=job.deterministic)
        if job.wants_group
        else None
    )
    jobs.admit(session, job.id, recipe=recipe, choices=all_choices, group_key=key)
    return None


def make_failure(refusal: Refusal | LorainitError) -> Failure:
    """Why an accepted job cannot run after all.

    The model may have left the catalogue since the order. Another refusal is a fault of ours, because `submit` has
    checked the order.
    """
    code = "unsupported_model" if refusal.code == "model_not_available" else "internal_error"
    return Failure(code, refusal.message, translate_field(refusal.param))


def _find_failure(file: File, field: str, job: Job) -> Failure | None:
    code, report = error_code(field), file.validation or {}
    if file.deleted_at is not None:
        return Failure(code, f"{field} {file.id} has been deleted.", field)
    if file.status == "error":
        return Failure(code, f"{field} {file.id} cannot be used: {file.status_details}.", field)
    if report.get("error_count") and job.on_row_error == "fail":
        return Failure(code, f"{field} {file.id}: {file.status_details}.", field)
    if report.get("kind") == "preference":
        return Failure(code, f"{field} {file.id} holds preference rows, which supervised training cannot use.", field)
    return None
