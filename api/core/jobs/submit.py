"""Makes a job of a request, after all checks that are fast, the cheapest first. Nothing here waits or commits.

What is wrong with an order is said before it is accepted, because a job that fails later has waited in the queue first.
The catalogue has the shapes of all layers for that, since this process must not open models.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from api.core import traces
from api.core.db.database import now
from api.core.db.tables import Adapter, Checkpoint, File, Job
from api.core.errors import BadReference, InvalidValue
from api.core.files import files
from api.core.ids import new_id
from api.core.jobs import jobs
from api.core.jobs.echoed import EchoedFields, require_matching
from api.core.models import catalogue
from api.core.queue import scheduling
from api.core.settings import get_settings
from lorainit.config.inits import Automatic, CalibratedConfig
from lorainit.config.resolve import base_learning_rate
from lorainit.config.spec import HIGHEST_RATE, LOWEST_RATE, Choice, Hyperparameters, Lora, explain_no_sharding

Priority = Literal["low", "normal", "high"]
PRIORITIES: dict[Priority, int] = {"low": 0, "normal": 1, "high": 2}
PRIORITY_NAMES = {number: name for name, number in PRIORITIES.items()}
CALIBRATION_FILE = "lora.init.calibration_file"
_RATES = "method.supervised.hyperparameters"


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a caller asks for. Its types and ranges are checked already."""

    model: str
    training_file: str
    validation_file: str | None
    suffix: str | None
    seed: int | None
    metadata: dict[str, str] | None
    lora: Lora
    training: Hyperparameters
    priority: Priority
    on_row_error: Literal["fail", "skip"]
    append_eos: bool
    deterministic: bool
    group: bool
    devices: int
    device: str
    echoed: EchoedFields = field(default_factory=EchoedFields)


def submit(
    session: Session,
    project_id: str,
    order: Order,
    *,
    experiment_id: str | None = None,
    stop_after: float | None = None,
) -> Job:
    """A new job, status `validating_files`.

    Args:
        experiment_id: the experiment that it is a cell of. Such a job is not counted against the quota here, because
            the quota of all cells is checked together.
        stop_after: the share of its steps after which it halts.

    Raises:
        Refusal: the model, a file, the adapter's shape or a feature cannot be used, or too many jobs wait.
    """
    entry = _find_base(session, project_id, order.model)
    found = _find_files(session, project_id, order)
    if order.training.max_length != "auto" and order.training.max_length > entry.max_length:
        raise InvalidValue(
            f"{_RATES}.max_length {order.training.max_length} is above the limit of model {entry.id!r},"
            f" {entry.max_length}.",
            code="invalid_value",
            param=f"{_RATES}.max_length",
        )
    if why := explain_no_sharding(order.training, order.lora, devices=order.devices):
        raise InvalidValue(why, code="unsupported_combination", param=f"{_RATES}.shard_base")
    if order.devices > (limit := get_settings().devices_per_job):
        raise InvalidValue(
            f"resources.devices {order.devices} is above what a job may have here, {limit}.",
            code="invalid_value",
            param="resources.devices",
        )
    # Only these "auto" values are resolved now, because those of the training depend on rows that are not counted yet.
    lora, choices = order.lora.resolve()
    lora = catalogue.resolve_targets(lora, entry)
    require_matching(order.echoed, lora, entry)
    _require_agreeing_rates(order.training, base_learning_rate(entry.reference(), lora.method))
    if isinstance(order.lora.init, Automatic):
        _require_possible_candidates(order.lora, entry)
        if order.validation_file is None:
            choices = explain_rule(choices, "without a validation file nothing can be compared")
        else:  # chosen later, by what the rows show (`api.core.experiments.auto`)
            lora, choices = order.lora, []
    for name, file in found.items():
        _require_no_known_error(file, name, order)
    if experiment_id is None:
        scheduling.require_queue_quota(session, project_id)
    job = Job(
        id=new_id("ftjob-"),
        project_id=project_id,
        created_at=now(session),
        status="validating_files",
        model=entry.id,
        training_file_id=order.training_file,
        validation_file_id=order.validation_file,
        suffix=order.suffix,
        seed=secrets.randbelow(2**31) if order.seed is None else order.seed,
        labels=order.metadata,
        integrations=[],
        recipe={"lora": lora.model_dump(mode="json"), "training": order.training.model_dump(mode="json")},
        choices=[choice.model_dump(mode="json") for choice in choices],
        priority=PRIORITIES[order.priority],
        on_row_error=order.on_row_error,
        append_eos=order.append_eos,
        deterministic=order.deterministic,
        wants_group=order.group,
        devices=order.devices,
        queue=scheduling.queue_for_device(order.device),
        lease_token=0,
        attempts=0,
        event_count=0,
        traceparent=traces.find_traceparent(),
        experiment_id=experiment_id,
        stop_after=stop_after,
    )
    return jobs.create(session, job)


# What a copy has in common with its job: what was ordered, and nothing of what came of it.
_ORDERED = (
    "project_id", "model", "training_file_id", "validation_file_id", "suffix", "integrations", "choices", "priority",
    "on_row_error", "append_eos", "deterministic", "wants_group", "devices", "queue", "traceparent", "experiment_id",
)  # fmt: skip


def submit_copy(
    session: Session,
    like: Job,
    *,
    seed: int,
    learning_rate: float,
    labels: dict[str, str],
    stop_after: float | None = None,
) -> Job:
    """A new job of the same experiment with another seed, rate and `stop_after`.

    Nothing is checked again, so it is for values that are checked already.

    Args:
        labels: pairs of metadata that replace those of `like`; its other pairs are kept.
    """
    rates = {"learning_rate": learning_rate, "learning_rate_multiplier": "auto"}
    recipe = {**like.recipe, "training": {**like.recipe["training"], **rates}}
    job = Job(
        **{name: getattr(like, name) for name in _ORDERED},
        id=new_id("ftjob-"),
        created_at=now(session),
        status="validating_files",
        seed=seed,
        labels={**(like.labels or {}), **labels},
        recipe=recipe,
        stop_after=stop_after,
        lease_token=0,
        attempts=0,
        event_count=0,
    )
    return jobs.create(session, job)


def _require_agreeing_rates(training: Hyperparameters, base: float) -> None:
    """Refuse a multiplier that leads to a rate out of range, or to another rate than the absolute one beside it.

    Both may be given, because a client that repeats an earlier job sends back both from its answer.
    """
    rate, multiplier = training.learning_rate, training.learning_rate_multiplier
    if rate is None and multiplier != "auto" and not LOWEST_RATE <= multiplier * base <= HIGHEST_RATE:
        raise InvalidValue(
            f"learning_rate_multiplier {multiplier:g} makes a rate of {multiplier * base:g}: the base rate of this"
            f" model and initialization is {base:g}, and a rate is {LOWEST_RATE:g} to {HIGHEST_RATE:g}.",
            code="invalid_value",
            param=f"{_RATES}.learning_rate_multiplier",
        )
    if rate is not None and multiplier != "auto" and not math.isclose(rate, multiplier * base, rel_tol=1e-6):
        raise InvalidValue(
            f"learning_rate_multiplier {multiplier:g} does not fit learning_rate {rate:g}: the base rate of this model"
            f" and initialization is {base:g}. Give one of the two.",
            code="invalid_value",
            param=f"{_RATES}.learning_rate_multiplier",
        )


def _require_possible_candidates(lora: Lora, entry: catalogue.Entry) -> None:
    """Refuse a method to choose from that this model cannot have."""
    assert isinstance(lora.init, Automatic)
    for index, name in enumerate(lora.init.candidates or ()):
        try:
            catalogue.resolve_targets(lora.with_init(name).resolve()[0], entry)
        except InvalidValue as refusal:
            param = f"lora.init.candidates[{index}]"
            raise InvalidValue(f"{name}: {refusal.message}", code=refusal.code, param=param) from refusal


def explain_rule(choices: Sequence[Choice], why: str) -> list[Choice]:
    """The choices of `Lora.resolve` for an automatic initialization, with the reason why no row decides."""
    first, *others = choices
    return [first.model_copy(update={"reason": f"by rule, because {why}: {first.reason}"}), *others]


def _find_base(session: Session, project_id: str, name: str) -> catalogue.Entry:
    """The base model of this name.

    An adapter's name gets an error of its own, because "not found" would read like a typing mistake.
    """
    if catalogue.find(name) is None:
        for table in (Adapter, Checkpoint):
            if session.scalar(select(table.name).where(table.name == name, table.project_id == project_id)):
                raise InvalidValue(
                    f"model {name!r} is an adapter: continuing from one is planned; use its base model for now.",
                    code="not_supported",
                    param="model",
                )
    return catalogue.require(name)


def _find_files(session: Session, project_id: str, order: Order) -> dict[str, File]:
    """The files of an order by the field that names them, locked against deletion until the commit."""
    if order.validation_file == order.training_file:
        raise InvalidValue(
            f"validation_file must be another file than training_file (both are {order.training_file!r}).",
            code="invalid_value",
            param="validation_file",
        )
    calibration = order.lora.init.calibration_file if isinstance(order.lora.init, CalibratedConfig) else None
    named = {
        "training_file": order.training_file,
        "validation_file": order.validation_file,
        CALIBRATION_FILE: calibration,
    }
    return {
        field: files.find_usable(session, project_id, file_id, param=field)
        for field, file_id in named.items()
        if file_id is not None
    }


def error_code(field: str) -> str:
    """The code for a file of that field which cannot be used; calibration rows are training rows."""
    return "invalid_validation_file" if field == "validation_file" else "invalid_training_file"


def _require_no_known_error(file: File, field: str, order: Order) -> None:
    """Refuse a file in which the check has found errors.

    A file that is not checked yet is no reason to refuse, because the answer to a create never waits for a check.
    """
    report = file.validation or {}
    faulty = file.status == "error" or (bool(report.get("error_count")) and order.on_row_error == "fail")
    if faulty:
        lines = [str(error["line"]) for error in report.get("errors", []) if error["line"] is not None][:5]
        where = f" Lines: {', '.join(lines)}." if lines else ""
        message = f"{field} {file.id} cannot be used: {file.status_details}.{where}"
        raise BadReference(message, code=error_code(field), param=field)
    if report.get("kind") == "preference":
        message = f"{field} {file.id} holds preference rows, which supervised training cannot use."
        raise BadReference(message, code=error_code(field), param=field)
