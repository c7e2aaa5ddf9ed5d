"""A worker without a GPU: the real queue, lease, progress and artifacts around a run that is only told.

Everything that the web process shows of a run is written by the worker's own code.
"""

import math
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from api.core.db.database import session_scope
from api.core.db.tables import Job
from api.core.files.storage import get_storage
from api.core.jobs import jobs
from api.core.jobs.jobs import Failure, Lease
from api.core.models import catalogue
from lorainit.config.events import Checkpoint, Done, InitReport, Message, Metrics, Plan, Stage, Warned
from lorainit.config.spec import Choice, Lora
from worker import reconciler
from worker.job import artifacts, outcomes
from worker.job.progress import EventRecorder, LeaseLost
from worker.maintenance import row_checks

PRECISION = "training.precision"
Validation = Callable[[Job, int], float | None]


def tidy() -> None:
    """Check every uploaded file and admit every job that waits for one."""
    while sum(lane() for lane in row_checks.LANES):
        pass
    while reconciler.admit():
        pass


def claim() -> tuple[Job, Lease] | None:
    """Take the next queued job."""
    with session_scope() as session:
        claimed = jobs.claim(session, "stub:1", lease_seconds=60)
        session.commit()
        return next(((job, Lease(job.id, job.lease_token)) for job in claimed), None)


def train(
    job: Job,
    lease: Lease,
    *,
    steps: int = 3,
    nan_at: int | None = None,
    warnings: Sequence[Warned] = (),
    valid: Validation | None = None,
) -> None:
    """Tell a run of `steps` steps with a checkpoint at the last one, then finish the job.

    `valid`: the validation loss of a job at a step, from 0 on; None = it evaluates nothing.
    """
    recorder = EventRecorder(lease)
    precision = job.recipe["training"]["precision"]
    automatic = precision == "auto"
    lora = Lora.model_validate(job.recipe["lora"])
    modules, parameters = catalogue.count_parameters(lora, catalogue.require(job.model))
    plan = Plan(
        total_steps=steps,
        steps_per_epoch=1,
        rows=20,
        trained_tokens_per_epoch=100,
        micro_batch_size=1,
        tokens_per_pass=1,
        modules=modules,
        trainable_parameters=parameters,
        target_modules=["q_proj"],
        device="cpu",
        precision="fp32" if automatic else precision,
        choices=[Choice(param=PRECISION, value="fp32", reason="there is no GPU")] if automatic else [],
    )
    recorder.add(Stage(stage="loading", message="Loading the base model"))
    recorder.add(plan)
    recorder.add(InitReport(report={"method": "kaiming", "seconds": 0.1}))
    recorder.add(Message(message="Initialized", data={"kind": "init"}))
    recorder.add(Stage(stage="training", message="Training"))
    for step in range(steps + 1):
        loss = None if valid is None else valid(job, step)
        if loss is not None:
            same = {"step": step, "total_steps": steps, "epoch": float(step)}
            both = {"valid_loss": loss, "full_valid_loss": loss, "valid_mean_token_accuracy": 0.5}
            recorder.add(Metrics(**same, tokens=10 * step, seconds=0.1 * step, **both))
        if not step:
            continue
        loss = None if step == nan_at else 2.0 / step
        recorder.add(
            Metrics(
                step=step,
                total_steps=steps,
                epoch=float(step),
                tokens=10 * step,
                seconds=0.1 * step,
                train_loss=loss,
                train_mean_token_accuracy=0.5,
                learning_rate=1e-4,
            )
        )
    recorder.flush()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _adapter(folder / "step")
        event = Checkpoint(step=steps, path=str(folder / "step"), metrics={"step": steps, "train_loss": 2.0 / steps})
        artifacts.store_checkpoint(job, lease, event, folder, get_storage())
        done = Done(
            adapter=str(_adapter(folder / "final")),
            trained_tokens=10 * steps,
            export_check={
                "passed": True,
                "format": "peft",
                "export_rank": job.recipe["lora"]["r"],
                "base_sha256": "0" * 64,
            },
            resources={"gpu_name": None, "gpus": 0},
            warnings=list(warnings),
        )
        artifacts.store_result(job, lease, done, folder, get_storage(), recorder.progress)


def halt(job: Job, lease: Lease, *, steps: int, valid: Validation) -> None:
    """Tell a run of `steps` steps that waits at the share of them that its job names, with a checkpoint."""
    assert job.stop_after is not None
    step = math.ceil(job.stop_after * steps)
    recorder = EventRecorder(lease)
    loss = valid(job, step)  # None = it is not finite
    both = {"valid_loss": loss, "full_valid_loss": loss}
    recorder.add(Metrics(step=step, total_steps=steps, epoch=1.0, tokens=step, seconds=float(step), **both))
    recorder.flush()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _adapter(folder / "step")
        event = Checkpoint(step=step, path=str(folder / "step"), metrics={"step": step, "full_valid_loss": loss})
        artifacts.store_checkpoint(job, lease, event, folder, get_storage())
    outcomes.halt(lease, step)


def _adapter(checkpoint: Path) -> Path:
    folder = checkpoint / "adapter"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 16)
    return folder


def fail(lease: Lease, code: str = "out_of_memory", message: str = "The device ran out of memory.") -> None:
    """End a run with an error."""
    with session_scope() as session:
        jobs.fail(session, lease, Failure(code, message))
        session.commit()


def run_all(valid: Validation | None = None) -> int:
    """Check, admit and train whatever there is; how many jobs were trained. `valid`: as for `train`."""
    tidy()
    count = 0
    while (taken := claim()) is not None:
        job, lease = taken
        labels = job.labels or {}
        label = labels.get("stub")
        try:
            if label == "fail" or (label is not None and label == f"fail {labels.get('cell')}"):
                fail(lease)
            elif label != "hold":
                train(job, lease, steps=45 if label == "long" else 3, nan_at=2 if label == "nan" else None, valid=valid)
        except LeaseLost:
            pass
        count += 1
    return count


def pretend_loss(job: Job, step: int) -> float | None:
    """A validation loss that depends on what was ordered; None without a validation file."""
    if job.validation_file_id is None:
        return None
    method, rate = job.recipe["lora"]["init"]["method"], job.recipe["training"]["learning_rate"]
    return 3.0 - 0.2 * step + 0.01 * len(method) + 10.0 * rate + 0.1 * (job.seed % 5)


def run(stop: threading.Event) -> None:
    """Work until told to stop."""
    while not stop.is_set():
        with suppress(FileNotFoundError):  # a file deleted while its rows were being read
            run_all(pretend_loss)
        reconciler.advance_experiments()
        stop.wait(0.1)


if __name__ == "__main__":
    run(threading.Event())
