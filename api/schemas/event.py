"""Events and checkpoints of a job."""

from typing import Any, Literal

from api.core.db.tables import Checkpoint, File
from api.core.jobs.events import ShownEvent
from api.schemas.wire import Element, Wire, replace_non_finite, to_unix


class EventObject(Element):
    """One event of a job; `sequence` counts from 1 without gaps."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: str
    message: str
    type: str
    data: dict[str, Any]
    sequence: int


class CheckpointMetrics(Wire):
    """What was measured at a checkpoint; null where nothing was."""

    step: int | None = None
    train_loss: float | None = None
    train_mean_token_accuracy: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_mean_token_accuracy: float | None = None


class CheckpointObject(Element):
    """A stored checkpoint; its name is retrievable as a model."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: CheckpointMetrics
    best: bool
    bytes: int
    sha256: str


def make_event_object(event: ShownEvent) -> EventObject:
    """A row as the caller sees it."""
    return EventObject(
        id=event.id,
        created_at=to_unix(event.created_at),
        level=event.level,
        message=event.message,
        type=event.type,
        data=replace_non_finite(event.data),
        sequence=event.sequence,
    )


def make_checkpoint_object(checkpoint: Checkpoint, file: File) -> CheckpointObject:
    """A row and its file as the caller sees them."""
    return CheckpointObject(
        id=checkpoint.id,
        created_at=to_unix(checkpoint.created_at),
        fine_tuning_job_id=checkpoint.job_id,
        fine_tuned_model_checkpoint=checkpoint.name,
        step_number=checkpoint.step,
        metrics=CheckpointMetrics.model_validate(replace_non_finite(checkpoint.metrics)),
        best=checkpoint.best,
        bytes=file.bytes,
        sha256=file.sha256,
    )
