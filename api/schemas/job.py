"""The job object. Every field is always there; what has no value yet is null."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import orjson
from pydantic import Field

from api.core.db.tables import ShownJob, shown_status
from api.core.fields import translate_choice
from api.core.jobs.lookup import JobView, Result
from api.core.jobs.submit import PRIORITY_NAMES
from api.core.models import catalogue
from api.core.queue import scheduling
from api.core.settings import get_settings
from api.schemas.wire import Element, Wire, replace_non_finite, to_unix, to_unix_or_none
from lorainit.config.inits import Automatic
from lorainit.config.spec import Lora

_FOLLOW_FROM_INIT = ("scaling", "modules", "trainable_parameters", "trainable_parameters_estimated")


class JobError(Wire):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class Progress(Wire):
    """How far a run is; `percent` is of the whole job.

    `stage_seconds`: this attempt's time by stage, from the worker's claim on (`starting` ends with the run's
    first event); `seconds_to_first_step`: from the claim to the first optimizer step.
    """

    stage: str = "loading"
    percent: float | None = None
    step: int | None = None
    total_steps: int | None = None
    epoch: float | None = None
    tokens_seen: int | None = None
    tokens_per_second: float | None = None
    train_loss: float | None = None
    elapsed_seconds: float | None = None
    remaining_seconds: float | None = None
    stage_seconds: dict[str, float] = Field(default_factory=dict)
    seconds_to_first_step: float | None = None
    updated_at: int | None = None


class JobWarning(Wire):
    """What the author of a job should know although it succeeded.

    `worse_than_base`, `worse_than_start` (with the losses of the untouched base, the start and the end), `no_effect`.
    """

    code: str
    message: str
    data: dict[str, float]


class Resume(Wire):
    """Whether the job can be resumed, and if not, why."""

    possible: bool
    from_step: int | None
    reason: str | None


class AdapterObject(Wire):
    """The finished adapter and the File that holds it."""

    file_id: str
    bytes: int
    format: Literal["peft", "peft_dora"]
    r: int
    base_model: str
    sha256: str


class JobObject(Element):
    """A fine-tuning job.

    `queue_position`: 1 for the next of its queue; exact up to 100, and 101 for every job behind these.
    """

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: str
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    seed: int
    error: JobError | None
    estimated_finish: int | None
    integrations: list[Any]
    metadata: dict[str, str] | None
    user_provided_suffix: str | None
    project_id: str
    priority: str
    on_row_error: str
    append_eos: bool
    deterministic: bool
    experiment_id: str | None
    queue_position: int | None
    queue_reason: str | None
    estimated_start: int | None
    resume: Resume
    progress: Progress | None
    lora: dict[str, Any]
    init_report: dict[str, Any] | None
    export_check: dict[str, Any] | None
    resources: dict[str, Any]
    warnings: list[JobWarning]
    adapter: AdapterObject | None


def make_job_object(view: JobView) -> JobObject:
    """A row and what belongs to it, as the caller sees it."""
    job, resumability, decided = view.job, view.resumability, _decided_by_the_run(view.job)
    training, choices = _training(job, decided), [*job.choices, *decided]
    progress = Progress.model_validate(replace_non_finite(job.progress)) if job.progress else None
    return JobObject(
        id=job.id,
        created_at=to_unix(job.created_at),
        finished_at=to_unix_or_none(job.finished_at),
        model=job.model,
        fine_tuned_model=view.result.adapter.name if view.result else None,
        organization_id=f"org-{get_settings().organization}",
        status=shown_status(job.status, job.pause_requested),
        training_file=job.training_file_id,
        validation_file=job.validation_file_id,
        result_files=[job.result_file_id] if job.result_file_id else [],
        trained_tokens=job.trained_tokens,
        hyperparameters=training,
        method={"type": "supervised", "supervised": {"hyperparameters": training, "auto": _of(choices, "method.")}},
        seed=job.seed,
        error=JobError.model_validate(job.error) if job.error else None,
        estimated_finish=_finish(job, progress),
        integrations=job.integrations,
        metadata=job.labels,
        user_provided_suffix=job.suffix,
        project_id=job.project_id,
        priority=PRIORITY_NAMES[job.priority],
        on_row_error=job.on_row_error,
        append_eos=job.append_eos,
        deterministic=job.deterministic,
        experiment_id=job.experiment_id,
        queue_position=view.position.position if view.position else None,
        queue_reason=view.position.reason if view.position else _explain_choice(job),
        estimated_start=None,
        resume=Resume(possible=resumability.possible, from_step=resumability.from_step, reason=resumability.reason),
        progress=progress,
        lora=_lora(job, choices),
        init_report=replace_non_finite(job.init_report),
        export_check=replace_non_finite(job.export_check),
        resources=_resources(job),
        warnings=[JobWarning.model_validate(found) for found in replace_non_finite(job.warnings) or []],
        adapter=_adapter(job, view.result) if view.result else None,
    )


def _explain_choice(job: ShownJob) -> str | None:
    """Why a job whose initialization is being chosen does not run yet."""
    if job.status != "validating_files" or job.recipe["lora"]["init"]["method"] != "auto":
        return None
    found = job.experiment_id
    return f"Experiment {found} tries candidates for the initialization on the job's rows." if found else None


def _resources(job: ShownJob) -> dict[str, Any]:
    asked = {"group": job.wants_group, "device": scheduling.device_for_queue(job.queue), "devices": job.devices}
    return {**asked, "trained_with": job.trained_with, **(replace_non_finite(job.resources) or {})}


def _of(choices: Sequence[dict[str, Any]], prefix: str) -> list[dict[str, Any]]:
    return [choice for choice in choices if choice["param"].startswith(prefix)]


def _decided_by_the_run(job: ShownJob) -> list[dict[str, Any]]:
    """Choices for "auto" that depend on the machine. There are none before the run has a plan."""
    return [translate_choice(choice) for choice in (job.plan or {}).get("choices", [])]


def _training(job: ShownJob, decided: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The requested hyperparameters, with the values that a run chose for "auto"."""
    found = {choice["param"].rpartition(".")[2]: replace_non_finite(choice["value"]) for choice in decided}
    return {**job.recipe["training"], **found}


def _lora(job: ShownJob, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The resolved adapter: what was requested, what follows from it, and what we chose."""
    lora, entry = _read(orjson.dumps(job.recipe["lora"])), catalogue.find(job.model)
    if isinstance(lora.init, Automatic):  # candidates are being tried, or the files are not checked yet
        return {**job.recipe["lora"], **dict.fromkeys(_FOLLOW_FROM_INIT), "rank_pattern": {}, "auto": []}
    modules, parameters = catalogue.count_parameters(lora, entry) if entry else (None, None)
    plan, report = job.plan or {}, job.init_report or {}
    init = {**job.recipe["lora"]["init"]}
    if init.get("seed") is None:
        init["seed"] = job.seed
    return {
        **job.recipe["lora"],
        "left_out": plan.get("left_out", job.recipe["lora"].get("left_out", [])),
        "init": init,
        "scaling": lora.scaling,
        "rank_pattern": report.get("rank_pattern", {}),
        "modules": plan.get("modules", modules),
        "trainable_parameters": report.get("trainable_parameters", plan.get("trainable_parameters", parameters)),
        # Until the run has distributed the ranks, each counts as r.
        "trainable_parameters_estimated": lora.method.export_rank == "per module"
        and "trainable_parameters" not in report,
        "auto": _of(choices, "lora."),
    }


@lru_cache(maxsize=256)
def _read(lora: bytes) -> Lora:
    """A stored adapter. Cached, because jobs of a list often have equal ones, and clients poll the same job."""
    return Lora.model_validate_json(lora)


def _finish(job: ShownJob, progress: Progress | None) -> int | None:
    if job.status != "running" or progress is None or progress.remaining_seconds is None:
        return None
    return int((progress.updated_at or to_unix(job.created_at)) + progress.remaining_seconds)


def _adapter(job: ShownJob, result: Result) -> AdapterObject | None:
    if result.adapter.deleted_at is not None:
        return None
    entry = catalogue.find(job.model)
    return AdapterObject(
        file_id=result.file.id,
        bytes=result.file.bytes,
        format="peft_dora" if job.recipe["lora"]["use_dora"] else "peft",
        r=result.adapter.rank,
        base_model=entry.root if entry else job.model,
        sha256=result.file.sha256,
    )
