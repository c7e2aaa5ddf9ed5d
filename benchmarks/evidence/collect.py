"""What an ended job showed, read over HTTP and made small: its curve, its costs, what it has in common with others."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from api.core.experiments.grid import name_inits

ENDED = ("succeeded", "failed", "cancelled")


def list_jobs(client: OpenAI, experiment_id: str) -> list[FineTuningJob]:
    """All jobs of an experiment."""
    return list(client.fine_tuning.jobs.list(metadata={"experiment_id": experiment_id}, limit=100))


def read_cell(
    client: OpenAI, job: FineTuningJob, inits: Sequence[Mapping[str, Any]], *, machine: str
) -> dict[str, Any]:
    """The cell of a job that has ended. `seconds` of a run that was interrupted are those of its last attempt only."""
    found = job.model_dump(mode="json")
    resources, report, adapter = found["resources"], found["init_report"] or {}, found["adapter"] or {}
    curve = _read_curve(client, job) if job.status == "succeeded" else []
    return {
        "init": name_inits(inits).index(found["metadata"]["cell"].split("/")[0]),
        "rate": found["method"]["supervised"]["hyperparameters"]["learning_rate"],
        "seed": found["seed"],
        "status": found["status"],
        "error": (found["error"] or {}).get("code"),
        "steps": [step for step, _, _ in curve],
        "tokens": [tokens for _, tokens, _ in curve],
        "losses": [loss for _, _, loss in curve],
        "attempts": resources.get("attempts", 1),
        "init_seconds": _round(report.get("seconds")),
        "cached": report.get("cached"),
        "stage_seconds": {name: _round(value) for name, value in (resources.get("stage_seconds") or {}).items()},
        "peak_memory_bytes": resources.get("peak_memory_bytes"),
        "trainable_parameters": found["lora"]["trainable_parameters"],
        "export_rank": adapter.get("r"),
        "adapter_bytes": adapter.get("bytes"),
        "finished_at": found["finished_at"],
        "job_id": found["id"],
        "same": {**_read_same(found), "machine": machine},
    }


def _read_curve(client: OpenAI, job: FineTuningJob) -> list[tuple[int, int, float]]:
    """Step, tokens and validation loss of each evaluation."""
    text = client.files.content(job.result_files[0]).text
    rows = csv.DictReader(io.StringIO(text))
    return [(int(row["step"]), int(row["tokens"]), round(float(row["full_valid_loss"]), 6))
            for row in rows if row["full_valid_loss"]]  # fmt: skip


def _read_same(job: Mapping[str, Any]) -> dict[str, Any]:
    """What cells must have in common to be compared, as `api.core.experiments.outcome` names it."""
    resources, training = job["resources"], job["method"]["supervised"]["hyperparameters"]
    return {
        "base_sha256": (job["export_check"] or {}).get("base_sha256"),
        "effective_batch_size": training["batch_size"],
        "steps": training["max_steps"],
        "trained_tokens": job["trained_tokens"],
        "lr_scheduler": training["lr_scheduler"],
        "precision": training["precision"],
        "gpu_name": resources.get("gpu_name"),
        "processor": resources.get("processor"),
        "packages": resources.get("packages"),
    }


def _round(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 2)
