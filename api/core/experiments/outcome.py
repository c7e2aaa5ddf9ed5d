"""What an ended job contributes to its experiment, as JSON. It is kept with the cell, so the job may be removed."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from api.core.db.tables import Adapter, File, Job, Metric
from lorainit.config.spec import Lora

At = Literal["best", "final"]
CURVE_POINTS = 200  # evaluations that are kept of a run, because a picture shows no more
METRICS = ("valid_loss", "valid_mean_token_accuracy")


def read_outcome(session: Session, job: Job) -> dict[str, Any]:
    """The outcome of an ended job: its status, its validation curve, its cost, and the facts that must be equal."""
    resources, report = job.resources or {}, job.init_report or {}
    curve = _read_curve(session, job.id)
    last = session.execute(
        select(Metric.values).where(Metric.job_id == job.id).order_by(Metric.step.desc()).limit(1)
    ).scalar()
    adapter = session.get(Adapter, job.id)
    file = None if adapter is None else session.get(File, adapter.file_id)
    plan = job.plan or {}
    return {
        "status": job.status,
        "error": job.error,
        "curve": curve,
        "init_seconds": report.get("seconds"),
        "start_batches": Lora.model_validate(job.recipe["lora"]).method.batches_used(report) if report else 0,
        "train_seconds": (last or {}).get("seconds"),
        "gpu_seconds": resources.get("gpu_seconds"),
        "peak_memory_bytes": resources.get("peak_memory_bytes"),
        "cached": report.get("cached"),
        "trainable_parameters": report.get("trainable_parameters", plan.get("trainable_parameters")),
        "export_rank": None if adapter is None else adapter.rank,
        "adapter_bytes": None if file is None else file.bytes,
        "same": _read_same(session, job),
    }


def _read_curve(session: Session, job_id: str) -> list[dict[str, Any]]:
    """The evaluations of a run, at most `CURVE_POINTS` of them, the first and the last included."""
    rows = session.execute(select(Metric.step, Metric.values).where(Metric.job_id == job_id).order_by(Metric.step))
    points = [
        {"step": step, "tokens": values["tokens"], "seconds": values["seconds"]}
        | {name: values.get(name) for name in METRICS}
        for step, values in rows
        if values.get("valid_loss") is not None
    ]
    if len(points) <= CURVE_POINTS:
        return points
    best = min(range(len(points)), key=lambda index: points[index]["valid_loss"])
    kept = {round(index * (len(points) - 1) / (CURVE_POINTS - 2)) for index in range(CURVE_POINTS - 1)}
    return [points[index] for index in sorted({*kept, best})]


def _read_same(session: Session, job: Job) -> dict[str, Any]:
    """What all cells must have in common for a fair comparison."""
    plan, resources, training = job.plan or {}, job.resources or {}, job.recipe["training"]
    return {
        "base_sha256": (job.export_check or {}).get("base_sha256"),
        "training_sha256": session.get_one(File, job.training_file_id).sha256,
        "validation_sha256": session.get_one(File, job.validation_file_id).sha256 if job.validation_file_id else None,
        "steps": plan.get("total_steps"),
        "effective_batch_size": training["batch_size"],
        "trained_tokens": job.trained_tokens,
        "lr_scheduler": training["lr_scheduler"],
        "precision": plan.get("precision"),
        "gpu_name": resources.get("gpu_name"),
        "processor": resources.get("processor"),
        "packages": resources.get("packages"),
    }


def find_value(outcome: Mapping[str, Any] | None, *, metric: str, goal: str, at: At) -> float | None:
    """The number by which a cell is compared; None if its job did not succeed or has no such number.

    "best" looks at the evaluations after training has begun: the one before step 1 shows the start, which every
    initialization that keeps the base's function has in common.
    """
    if outcome is None or outcome["status"] != "succeeded":
        return None
    values: list[float | None] = [point[metric] for point in outcome["curve"] if point["step"] > 0]
    if not values or values[-1] is None:
        return None
    if at == "final":
        return values[-1]
    known = [value for value in values if value is not None]
    return min(known) if goal == "min" else max(known)


def find_crossing(curve: Sequence[Mapping[str, Any]], *, level: float, of: str) -> float | None:
    """The step, tokens or seconds (`of`) of the first evaluation whose validation loss is at most `level`."""
    return next(
        (point[of] for point in curve if point["valid_loss"] is not None and point["valid_loss"] <= level), None
    )
