"""The recipe: load, initialize, train, export, verify. One run, from a spec to an adapter.

`run` is the library's front door. It talks through `on_event` only, and leaves in `out` what it
made: `adapter/`, `checkpoints/`, `metrics.jsonl`, `step_metrics.csv`, `spec.json` (resolved).
"""

import errno
import gc
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorainit import adapter, checkpoint, fidelity, hardware, init_stage
from lorainit.errors import DiskFull, OutOfMemory, UnsupportedModel
from lorainit.events import Done, InitReport, Message, Stage
from lorainit.initialize import Report
from lorainit.inits import HRP
from lorainit.prepare import Job, OnEvent, prepare
from lorainit.results import write_csv
from lorainit.spec import RunSpec
from lorainit.train import train


def run(spec: RunSpec, out: Path, on_event: OnEvent) -> Done:
    """Run a spec from beginning to end.

    Args:
        out: a folder of this run's own; made if absent.
        on_event: called with every event; what it raises stops the run. Called at least once per
            layer initialized and per batch.

    Returns:
        The last event, which `on_event` has seen too.

    Raises:
        LorainitError: one of its subclasses, for everything a caller could have caused or can fix.
    """
    started = time.monotonic()
    out = Path(out)
    with _as_our_errors(), hardware.reproducible(spec.seed, deterministic=spec.deterministic):
        out.mkdir(parents=True, exist_ok=True)
        on_event(Stage(stage="loading", message=f"Loading {spec.model.id}"))
        job = prepare(spec, out, on_event)
        _write_spec(job, out)
        on_event(job.plan)

        restored = _restored(job)
        on_event(Stage(stage="initializing", message=f"Initializing with {job.lora.method.method}"))
        report = _resume(job, restored) if restored else init_stage.start(job, on_event)
        on_event(InitReport(report=report.summary))

        progress = train(
            job.model,
            job.data,
            job.valid,
            job.training,
            out=out,
            seed=spec.seed,
            micro_batch_size=job.plan.micro_batch_size,
            pad=job.pad,
            checkpoint_recipe=job.recipe,
            write_adapter=lambda folder: _write_adapter(job, folder, report),
            skip=_skipped(job, report),
            resumed=restored,
            on_event=on_event,
        )
        _write_csv(out)

        on_event(Stage(stage="exporting", message="Writing the adapter in PEFT's format"))
        _write_adapter(job, out / "adapter", report)
        check = _verify(job, out / "adapter", on_event)

        _write_manifest(job, out / "adapter", report, export_check=check)
        done = Done(
            adapter=str((out / "adapter").resolve()),
            trained_tokens=progress.tokens,
            export_check=check,
            resources=_resources(job, report, out, time.monotonic() - started),
        )
        on_event(done)
        return done


# --- going on from a checkpoint ------------------------------------------------------------------


def _restored(job: Job) -> checkpoint.Restored | None:
    if job.spec.resume_from is None:
        return None
    return checkpoint.read(Path(job.spec.resume_from), recipe=job.recipe)


def _resume(job: Job, restored: checkpoint.Restored) -> Report:
    """The layers as the checkpoint has them, and the report of the initialization they came from."""
    checkpoint.attach_layers(job.model, job.targets, job.lora, restored)
    report = json.loads((restored.folder / "adapter" / "init_report.json").read_text())
    modules = report.pop("per_module")
    return Report(report, modules)


def _skipped(job: Job, report: Report) -> int:
    """Batches that the preheat has used up, where the main run is to go on after them."""
    method = job.lora.method
    return int(report.summary["preheat"]["steps"]) if isinstance(method, HRP) and method.main_data == "continue" else 0


# --- exporting ---------------------------------------------------------------------------------


def _write_adapter(job: Job, folder: Path, report: Report) -> None:
    """Everything of the download but the export check, which only the final adapter has."""
    rslora = job.lora.use_rslora is True
    rank = adapter.export(job.model, folder, root=job.spec.model.root, rslora=rslora)
    job.tokenizer.save_pretrained(folder)
    alpha = adapter.plain_alpha(r=rank, scale=job.lora.scaling, rslora=rslora)
    facts = job.lora.method.facts
    paper = f"arXiv {facts.arxiv}" if facts.arxiv else ""
    adapter.model_card(
        folder,
        root=job.spec.model.root,
        method=job.lora.method.method,
        paper=paper,
        rank=rank,
        alpha=alpha,
        quantization=job.lora.quantization,
        dora=job.lora.use_dora,
    )
    adapter.write_json(folder / "init_report.json", {**report.summary, "per_module": report.modules})
    _write_manifest(job, folder, report, export_check=None)


def _verify(job: Job, folder: Path, on_event: OnEvent) -> dict[str, Any]:
    """Trained logits first, then the trained model goes, then stock PEFT on a fresh base."""
    on_event(Stage(stage="verifying", message="Reloading the adapter on the untouched base"))
    texts = adapter.prompts(job.data.samples)
    expected: list[Tensor] = adapter.record(job.model, texts, on_event=on_event)
    rows = fidelity.held_out(job.data, job.valid)
    losses = fidelity.token_losses(job.model, rows, on_event=on_event)
    job.targets.clear()
    job.model = nn.Module()
    gc.collect()
    result = adapter.check(
        job.folder,
        folder,
        texts,
        expected,
        source_rank=job.lora.r,
        base_sha256=job.base_sha256,
        dtype=job.dtype,
        device=job.device,
        quantization=job.lora.quantization,
        on_event=on_event,
    )
    level = "info" if result["passed"] else "error"
    text = f"Export check: logits differ by {result['max_abs_logit_difference']:.2g} at most"
    on_event(Message.model_validate({"level": level, "message": text, "data": {"kind": "export", **result}}))
    adapter.require(result)
    result["fidelity"] = fidelity.measure(
        job.folder,
        folder,
        rows,
        losses,
        dtype=job.dtype,
        device=job.device,
        quantization=job.lora.quantization,
        on_event=on_event,
    )
    return result


def _write_manifest(job: Job, folder: Path, report: Report, *, export_check: dict[str, Any] | None) -> None:
    data = {"sha256": job.data.sha256, "rows": job.data.rows, "usable": len(job.data.samples)}
    valid = job.valid and {"sha256": job.valid.sha256, "rows": job.valid.rows, "usable": len(job.valid.samples)}
    manifest = {
        "base": {"id": job.spec.model.id, "root": job.spec.model.root, "sha256": job.base_sha256},
        "lora": {**job.lora.model_dump(mode="json"), "scaling": job.lora.scaling},
        "training": job.training.model_dump(mode="json"),
        "seeds": {"run": job.spec.seed, "init": report.summary["seed"]},
        "data": {"training": data, "validation": valid, "order": "by keyed hash of seed, epoch and file hash"},
        "plan": job.plan.model_dump(exclude={"kind"}),
        "deterministic": job.spec.deterministic,
        "packages": hardware.versions(),
        "hardware": hardware.description(),
        "init_report": report.summary,
        "export_check": export_check,
    }
    adapter.write_json(folder / "manifest.json", manifest)


def _write_spec(job: Job, out: Path) -> None:
    update = {"lora": job.lora, "training": job.training, "micro_batch_size": job.plan.micro_batch_size}
    adapter.write_json(out / "spec.json", job.spec.model_copy(update=update).model_dump(mode="json"))


def _write_csv(out: Path) -> None:
    with (out / "metrics.jsonl").open() as log, (out / "step_metrics.csv").open("w", newline="") as stream:
        write_csv((json.loads(line) for line in log), stream)


def _resources(job: Job, report: Report, out: Path, seconds: float) -> dict[str, Any]:
    gpu = hardware.gpu_name()
    return {
        "gpu_name": gpu,
        "gpus": 1 if gpu else 0,
        "gpu_seconds": round(seconds, 1) if gpu else 0.0,
        "init_gpu_seconds": report.summary["seconds"] if gpu else 0.0,
        "peak_memory_bytes": hardware.peak_memory_bytes(),
        "micro_batch_size": job.plan.micro_batch_size,
        "gradient_accumulation_steps": job.plan.gradient_accumulation_steps,
        "oom_retries": 0,
        "disk_bytes": sum(p.stat().st_size for p in out.rglob("*") if p.is_file()),
    }


# --- errors ------------------------------------------------------------------------------------


@contextmanager
def _as_our_errors() -> Iterator[None]:
    """Machine failures a caller can do something about, as errors with advice."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory() from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"No space left to write {error.filename or 'the results'}.") from error
        raise
    except RuntimeError as error:
        text = str(error)
        if "can't allocate memory" in text or "not enough memory" in text:
            raise _out_of_memory() from error
        if "No space left on device" in text:
            raise DiskFull("No space left to write the results.") from error
        if "deterministic" in text and "use_deterministic_algorithms" in text:
            raise UnsupportedModel(
                "This base model needs a kernel without a deterministic form: set deterministic to false.",
                param="deterministic",
            ) from error
        raise


def _out_of_memory() -> OutOfMemory:
    return OutOfMemory(
        "The device ran out of memory. A smaller max_length or batch_size, a lower r, or fewer target modules helps.",
        param="method.supervised.hyperparameters.max_length",
    )
