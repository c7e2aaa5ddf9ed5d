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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorainit import adapter, cache, checkpoint, hardware
from lorainit.cache import Cache
from lorainit.data import Batch, Sample, batches, collate, order
from lorainit.errors import DiskFull, OutOfMemory, UnsupportedModel
from lorainit.events import Done, InitReport, Message, Stage
from lorainit.evidence import Evidence
from lorainit.evidence.collect import Context, collect
from lorainit.initialize import Known, Report, initialize
from lorainit.layer import adapted
from lorainit.methods import Factors
from lorainit.prepare import Job, OnEvent, prepare
from lorainit.results import write_csv
from lorainit.spec import HRP, RunSpec
from lorainit.train import train

PROBE_ROWS, PROBE_TOKENS = 4, 256
WORTH_KEEPING_SECONDS = 1.0  # a start that took less is made faster than it is read


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
        report = _resume(job, restored) if restored else _initialize(job, on_event)
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


# --- initializing ------------------------------------------------------------------------------


def _initialize(job: Job, on_event: OnEvent) -> Report:
    started = time.monotonic()
    context = _context(job, on_event)
    store, keys = _cache(job, on_event), _keys(job, context)
    known = store.starts(keys.starts)
    evidence, cached = ({}, True) if known else _evidence(context, store, keys)
    report = initialize(
        job.model,
        job.targets,
        job.lora,
        seed=job.spec.seed,
        probe=_probe(job),
        on_event=on_event,
        evidence=evidence,
        known=known,
        calibration=[] if job.lora.method.function_preserving else _calibration(context),
        weight_decay=job.training.weight_decay,
        rate=job.training.learning_rate or 0.0,
        started=started,
        cached=cached,
    )
    if known is None and report.summary["seconds"] >= WORTH_KEEPING_SECONDS:
        layers = adapted(job.model)
        starts = {m["name"]: Known(Factors(A=layers[m["name"]].A, B=layers[m["name"]].B), m) for m in report.modules}
        store.keep_starts(keys.starts, starts)
    return report


def _context(job: Job, on_event: OnEvent) -> Context:
    return Context(
        model=job.model,
        targets=job.targets,
        samples=job.calibration.samples if job.calibration else job.data.samples,
        training_samples=job.data.samples,
        pad=job.pad,
        device=job.device,
        micro_batch_size=job.plan.micro_batch_size,
        lora=job.lora,
        training=job.training,
        total_steps=job.plan.total_steps,
        seed=job.spec.seed,
        on_event=on_event,
        order=lambda epoch: order(job.data, seed=job.spec.seed, epoch=epoch),
        folder=job.folder,
    )


def _probe(job: Job) -> Batch:
    """A few short training rows; those whose first trained token comes late are taken whole."""
    rows = [
        Sample(s.line, s.ids[:PROBE_TOKENS], s.trained[:PROBE_TOKENS])
        for s in job.data.samples
        if s.trained[1:PROBE_TOKENS].any()
    ]
    return collate((rows or job.data.samples)[:PROBE_ROWS], pad=job.pad).to(job.device)


def _calibration(context: Context) -> list[Batch]:
    """The rows that a displaced start was made from, in passes that fit the device."""
    rows = [s for s in context.samples if s.trained[1:].any()]
    rows = rows[: getattr(context.lora.method, "samples", PROBE_ROWS)]
    pieces = batches(rows, context.micro_batch_size)
    return [collate(piece, pad=context.pad).to(context.device) for piece in pieces]


def _skipped(job: Job, report: Report) -> int:
    """Batches that the preheat has used up, where the main run is to go on after them."""
    method = job.lora.method
    return int(report.summary["preheat"]["steps"]) if isinstance(method, HRP) and method.main_data == "continue" else 0


# --- what earlier runs found out ----------------------------------------------------------------


class _Keys(NamedTuple):
    evidence: str
    starts: str


def _cache(job: Job, on_event: OnEvent) -> Cache:
    """A run without a cache folder keeps nothing."""
    folder, limit = job.spec.cache, job.spec.cache_limit_bytes
    return Cache(Path(folder or job.folder) / "init", limit if folder else 0, on_event)


def _evidence(context: Context, store: Cache, keys: _Keys) -> tuple[dict[str, Evidence], bool]:
    """The evidence, and whether it came from the cache."""
    config = context.lora.method
    if config.facts.needs in ("none", "weight"):
        return collect(config, context), False
    found = store.evidence(keys.evidence)
    if found is not None:
        return found, True
    found = collect(config, context)
    store.keep_evidence(keys.evidence, found)
    return found, False


def _keys(job: Job, context: Context) -> _Keys:
    """Everything that shapes evidence and starts; the seed only where it does."""
    config = job.lora.method
    seed = config.seed_for(job.spec.seed)
    looks_at_data = config.facts.needs not in ("none", "weight")
    parts: dict[str, Any] = {
        "base": job.base_sha256,
        "method": config.model_dump(mode="json", exclude={"seed", "calibration_file"}),
        "lora": [job.lora.r, job.lora.scaling],
        "quantization": job.lora.quantization,
        "targets": list(job.targets),
        "device": job.device.type,
        "precision": job.plan.precision,
        "data": cache.data_digest(context.samples) if looks_at_data else None,
        "micro_batch_size": job.plan.micro_batch_size if looks_at_data else None,
    }
    if config.facts.needs == "preheat":
        recipe = job.training.model_dump(mode="json"), job.data.sha256, job.plan.total_steps, job.spec.seed
        parts |= {"recipe": recipe}
    return _Keys(
        evidence=cache.key(**parts, part="evidence", seed=seed if config.drawn == "evidence" else None),
        starts=cache.key(
            **parts, part="starts", seed=None if config.drawn == "nothing" else seed, dora=job.lora.use_dora
        ),
    )


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
