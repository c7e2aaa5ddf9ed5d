"""What a run leaves behind: the adapter with its papers, the proof that it loads, the metrics, the resolved spec."""

import gc
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorainit.config.errors import ExportCheckFailed
from lorainit.config.events import Message, Stage, Warned
from lorainit.config.results import write_csv
from lorainit.config.sources import local_path
from lorainit.export import check, fidelity, model_card, peft_adapter
from lorainit.export import effect as effects
from lorainit.export.effect import Effect
from lorainit.init.initialize import Report
from lorainit.model.base import OnEvent
from lorainit.model.layers.experts import ExpertLinear
from lorainit.model.layers.layer import LoRALinear, borrowed
from lorainit.model.layers.quantize import nf4_config
from lorainit.model.load import free
from lorainit.model.source import tokenizer_files
from lorainit.prepare import Job
from lorainit.runtime import hardware
from lorainit.runtime.hardware import is_out_of_memory
from lorainit.runtime.machine_errors import is_machine_failure

# Largest relative difference of two losses in float32 that is rounding; mixtures may route a token differently.
SAME_LOSS = 1e-3


def write_adapter(job: Job, folder: Path, report: Report) -> None:
    """Everything of the download but the export check, which only the final adapter has."""
    rank = write_factors(job, job.layers, folder)
    tokenizer_files.copy(job.base.tokenizer, job.base.location.folder, folder)
    alpha = peft_adapter.plain_alpha(r=rank, scale=job.lora.scaling)
    facts = job.lora.method.facts
    paper = f"arXiv {facts.arxiv}" if facts.arxiv else ""
    model_card.write(
        folder,
        root=job.spec.model.root,
        method=job.lora.method.method,
        paper=paper,
        rank=rank,
        alpha=alpha,
        loading=nf4_config(job.base.four_bits.skip) if job.base.four_bits else None,
        unpackable=job.base.four_bits is not None and job.base.four_bits.unpackable,
        dora=job.lora.use_dora,
        gguf=_gguf(job.spec.model.source),
        experts=any(isinstance(layer.base, ExpertLinear) for layer in job.layers.values()),
    )
    peft_adapter.write_json(folder / "init_report.json", {**report.summary, "per_module": report.modules})
    write_manifest(job, folder, report, export_check=None)


def _gguf(source: str) -> str | None:
    """The name of the GGUF file that a source is."""
    path = local_path(source)
    return path.name if path is not None and path.suffix == ".gguf" else None


def write_factors(job: Job, layers: Mapping[str, LoRALinear], folder: Path) -> int:
    """What a loader reads: factors and their configuration; returns the (largest) rank."""
    ranks = job.lora.method.written_ranks
    return peft_adapter.export(job.base.model, layers, folder, root=job.spec.model.root, ranks=ranks)


def unproven(folder: Path) -> Path:
    """Where an adapter lies until it is checked: under a name that nobody takes for a download."""
    return folder.with_name(f".{folder.name}-unproven")


@contextmanager
def complete_or_absent(folder: Path) -> Iterator[Path]:
    """A folder to write and check an adapter in, which becomes `folder` when the context ends without an error.

    Whatever lay at `folder` goes first. A crash leaves nothing there, and an error nothing at all.
    """
    work = unproven(folder)
    for old in (folder, work):
        shutil.rmtree(old, ignore_errors=True)
    try:
        yield work
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@dataclass(frozen=True)
class Observed:
    """What a trained adapter does, in the host's memory: all that its check needs of the model that was trained.

    `losses`: of every trained token of `rows`; None where the base is divided, whose served forms are not measured.
    """

    effect: Effect
    rows: fidelity.HeldOut
    losses: Tensor | None

    @property
    def longest(self) -> int:
        """Tokens of the longest row that goes through a base when it is checked."""
        return max(len(ids) for ids in [*self.effect.texts, *(sample.ids for sample in self.rows.samples)])


def observe(job: Job, on_event: OnEvent) -> Observed:
    """Note what the trained adapter does to the base, which stays bare; the job lets go of both."""
    texts = check.prompts(job.data.samples)
    effect = effects.observe(job.base.model, job.layers, texts, divided=bool(job.base.sharded), on_event=on_event)
    rows, losses = fidelity.held_out(job.data, job.valid), None
    if not job.base.sharded:
        with borrowed(job.base.model, job.layers):
            losses = fidelity.token_losses(job.base.model, rows, on_event=on_event)
    job.targets.clear()
    job.layers.clear()
    return Observed(effect, rows, losses)


def verify(job: Job, folder: Path, seen: Observed, on_event: OnEvent, *, beside: bool) -> dict[str, Any]:
    """Load the written adapter with stock PEFT on a fresh base and compare it with the trained model.

    Args:
        beside: the base that it was trained on stays in memory; running out of it is the caller's to deal with.

    Raises:
        ExportCheckFailed: they differ.
    """
    on_event(Stage(stage="verifying", message="Reloading the adapter on the untouched base"))
    gc.collect()
    # PEFT measures the weights that a DoRA scales, and takes no parts for that.
    base = job.base.fresh(in_parts=not job.lora.use_dora)
    try:
        return _compared(job, folder, seen, base, on_event, beside=beside)
    finally:
        free(base)


def _compared(
    job: Job, folder: Path, seen: Observed, base: nn.Module, on_event: OnEvent, *, beside: bool
) -> dict[str, Any]:
    rows, losses = seen.rows, seen.losses
    result, served = check.check(
        base,
        folder,
        seen.effect,
        source_rank=job.lora.r,
        base_sha256=job.base.sha256,
        place=job.base.place,
        on_event=on_event,
    )
    _tell(result, on_event)
    check.require(result)
    if losses is None:
        result["fidelity"] = fidelity.unmeasured(rows, dtype=job.base.dtype, reason=fidelity.DIVIDED, on_event=on_event)
        return result
    try:
        result["fidelity"] = fidelity.measure(
            job.base.location.folder,
            folder,
            rows,
            losses,
            served=served,
            dtype=job.base.dtype,
            device=job.base.device,
            quantization=job.lora.quantization,
            on_event=on_event,
        )
    except check.FAULTS as error:  # a base that does not run in bf16, for one: the adapter has passed its check
        if is_machine_failure(error) and (beside or not is_out_of_memory(error)):
            raise
        reason = f"measuring it failed: {check.short(error)}"
        result["fidelity"] = fidelity.unmeasured(rows, dtype=job.base.dtype, reason=reason, on_event=on_event)
    _require_same_loss(result["fidelity"])
    return result


def _require_same_loss(facts: dict[str, Any]) -> None:
    """In float32 what we minimize has to be what stock transformers makes of the merged adapter on the same rows."""
    ours, stock = facts["trained_loss"], facts["merged_fp32_loss"]
    if facts["precision"] != "fp32" or ours is None or stock is None:
        return
    if not abs(ours - stock) <= SAME_LOSS * max(1.0, abs(stock)):
        raise ExportCheckFailed(
            f"The loss on held-out rows was {ours:.6g} while it was trained, and is {stock:.6g} as stock transformers"
            " computes it with the adapter merged into the base."
        )


def _tell(result: dict[str, Any], on_event: OnEvent) -> None:
    text = f"Export check: {result['message']}"
    if result["passed"]:
        text = (
            f"Export check: with stock PEFT, {result['modules']} layers add what was trained to within"
            f" {result['max_module_difference']:.1g} of it, and logits differ by"
            f" {result['max_abs_logit_difference']:.3g} at most where the adapter changes them by up to"
            f" {result['max_abs_logit_effect']:.3g}"
        )
    level = "info" if result["passed"] else "error"
    on_event(Message.model_validate({"level": level, "message": text, "data": {"kind": "export", **result}}))


def write_manifest(
    job: Job, folder: Path, report: Report, *, export_check: dict[str, Any] | None, warnings: Sequence[Warned] = ()
) -> None:
    """Everything needed to tell what exactly ran."""
    data = {"sha256": job.data.sha256, "rows": job.data.rows, "usable": len(job.data.samples)}
    valid = job.valid and {"sha256": job.valid.sha256, "rows": job.valid.rows, "usable": len(job.valid.samples)}
    held = job.base.four_bits and job.base.four_bits.statement(job.base.dtype)
    manifest = {
        "base": {
            "id": job.spec.model.id,
            "root": job.spec.model.root,
            "sha256": job.base.sha256,
            "quantization": held,
        },
        "lora": {**job.lora.model_dump(mode="json"), "scaling": job.lora.scaling},
        "training": job.training.model_dump(mode="json"),
        "seeds": {"run": job.spec.seed, "init": report.summary["seed"]},
        "data": {"training": data, "validation": valid, "order": "by keyed hash of seed, epoch and file hash"},
        "plan": job.plan.model_dump(exclude={"kind", "member"}),
        "passes": job.passes.model_dump(exclude={"kept"}),
        "deterministic": job.spec.deterministic,
        "packages": hardware.versions(),
        "hardware": hardware.description(),
        "init_report": report.summary,
        "proof": job.proof,
        "export_check": export_check,
        "warnings": [found.model_dump() for found in warnings],
    }
    peft_adapter.write_json(folder / "manifest.json", manifest)


def write_spec(job: Job, out: Path) -> None:
    """The spec with every "auto" resolved, and passes as they begin: memory may make them smaller."""
    passes = {"micro_batch_size": job.passes.begun.rows, "tokens_per_pass": job.passes.begun.tokens}
    update = {"lora": job.lora, "training": job.training, **passes}
    peft_adapter.write_json(out / "spec.json", job.spec.model_copy(update=update).model_dump(mode="json"))


def write_metrics(out: Path) -> None:
    """The step log as CSV."""
    with (out / "metrics.jsonl").open() as log, (out / "step_metrics.csv").open("w", newline="") as stream:
        write_csv((json.loads(line) for line in log), stream)


def resources(job: Job, report: Report, out: Path, *, seconds: float, retries: int) -> dict[str, Any]:
    """What the run used, as shown in `job.resources`; `retries`: how often memory ran out before the first step."""
    gpu = hardware.gpu_name()
    gpus = job.spec.devices if gpu else 0
    return {
        "gpu_name": gpu,
        "gpus": gpus,
        "gpu_seconds": round(gpus * seconds, 1),
        "init_gpu_seconds": report.summary["seconds"] if gpu else 0.0,
        "peak_memory_bytes": hardware.peak_memory_bytes(),
        "micro_batch_size": job.passes.rows,
        "tokens_per_pass": job.passes.tokens,
        "gradient_accumulation_steps": job.passes_of_first_step,
        "oom_retries": retries,
        "disk_bytes": sum(p.stat().st_size for p in out.rglob("*") if p.is_file()),
    }
