"""Writes the initialization and the rate that were chosen for a job into it, with the reasons. Nothing here commits."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy.orm import Session

from api.core.db.database import now
from api.core.db.tables import Job
from api.core.jobs import events
from api.core.jobs.submit import explain_rule
from api.core.models import catalogue
from lorainit.config.spec import Choice, Lora

INIT, RATE = "lora.init", "method.supervised.hyperparameters.learning_rate"


def take_by_rule(session: Session, job: Job, why: str) -> None:
    """Choose as if there were no rows to look at, and say why."""
    lora, choices = Lora.model_validate(job.recipe["lora"]).resolve()
    choices = explain_rule(choices, why)
    _write(job, lora, choices)
    message = f"Initialization chosen: {lora.method.method}, {choices[0].reason}"
    events.append(session, job.id, message, at=now(session), data={"kind": "init_choice"})


def settle(job: Job, lora: Lora, choices: Sequence[Choice], *, rate: float, reason: str) -> None:
    """Write the chosen adapter and rate into the job, which still waits to be admitted."""
    asked = Lora.model_validate(job.recipe["lora"])
    _, others = asked.model_copy(update={"init": lora.init}).resolve()
    if job.recipe["training"]["learning_rate"] is None:
        choices = [*choices, Choice(param=RATE, value=rate, reason=reason)]
    _write(job, lora, [*choices, *others], learning_rate=rate, learning_rate_multiplier="auto")


def _write(job: Job, lora: Lora, choices: Sequence[Choice], **training: Any) -> None:
    resolved = catalogue.resolve_targets(lora, catalogue.require(job.model))
    job.recipe = {"lora": resolved.model_dump(mode="json"), "training": {**job.recipe["training"], **training}}
    job.choices = [choice.model_dump(mode="json") for choice in choices]
