"""The files of a run: the adapter with its model card and manifest, the metrics, and the resolved spec.

Also the export check of the finished adapter.
"""

import gc
import json
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorainit.config.errors import ExportCheckFailed
from lorainit.config.events import Message, OnEvent, Stage, Warned
from lorainit.config.results import write_csv
from lorainit.config.sources import local_path
from lorainit.context import Run
from lorainit.export import check, fidelity, model_card, peft_adapter
from lorainit.export import effect as effects
from lorainit.export.effect import Effect
from lorainit.model.layers.experts import ExpertLinear
from lorainit.model.layers.layer import LoRALinear, attach_temporarily
from lorainit.model.layers.quantize import nf4_config
from lorainit.model.load import free_model
from lorainit.model.source import tokenizer_files
from lorainit.runtime import devices
from lorainit.runtime.devices import is_out_of_memory
from lorainit.runtime.machine_errors import is_machine_failure

# The largest relative difference of two losses in float32 that counts as rounding. It is this large because a mixture
# may send a token to another expert.
SAME_LOSS = 1e-3


def write_adapter(run: Run, folder: Path) -> None:
    """Write all files of the download. The export check is still missing, because only the final adapter is checked."""
    rank = write_factors(run, run.layers, folder)
    tokenizer_files.copy(run.base.tokenizer, run.base.location.folder, folder)
    alpha = peft_adapter.plain_alpha(r=rank, scale=run.lora.scaling)
    facts = run.lora.method.facts
    paper = f"arXiv {facts.arxiv}" if facts.arxiv else ""
    model_card.write(
        folder,
        root=run.spec.model.root,
        method=run.lora.method.method,
        paper=paper,
        rank=rank,
        alpha=alpha,
        loading=nf4_config(run.base.four_bits.skip) if run.base.four_bits else None,
        unpackable=run.base.four_bits is not None and run.base.four_bits.unpackable,
        dora=run.lora.use_dora,
        gguf=_gguf_name(run.spec.model.source),
        experts=any(isinstance(layer.base, ExpertLinear) for layer in run.layers.values()),
    )
    peft_adapter.write_json(folder / "init_report.json", {**run.report.summary, "per_module": run.report.modules})
    write_manifest(run, folder, export_check=None)


def _gguf_name(source: str) -> str | None:
    """The name of the source's file if the source is a GGUF file."""
    path = local_path(source)
    return path.name if path is not None and path.suffix == ".gguf" else None


def write_factors(run: Run, layers: Mapping[str, LoRALinear], folder: Path) -> int:
    """Write the files that a loader needs, the factors and their configuration; return the largest rank."""
    ranks = run.lora.method.written_ranks
    return peft_adapter.export(run.base.model, layers, folder, root=run.spec.model.root, ranks=ranks)


def unverified_folder(folder: Path) -> Path:
    """The folder of an adapter until it is checked; hidden, so that nobody takes it for the download."""
    return folder.with_name(f".{folder.name}-unproven")


@contextmanager
def write_atomically(folder: Path) -> Iterator[Path]:
    """A folder to write and check an adapter in, which is renamed to `folder` if the context ends without an error.

    What was at `folder` is deleted first. So `folder` never holds an adapter that was not checked, even after a crash.
    After an error the temporary folder is deleted too.
    """
    work = unverified_folder(folder)
    for old in (folder, work):
        shutil.rmtree(old, ignore_errors=True)
    try:
        yield work
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@dataclass(frozen=True)
class Observed:
    """What a trained adapter does, in the host's memory, so that the trained model can be freed before the check.

    `losses`: the loss of every trained token of `rows`; None if the base is sharded, because then the ways of serving
    are not measured.
    """

    effect: Effect
    rows: fidelity.HeldOut
    losses: Tensor | None

    @property
    def longest(self) -> int:
        """The length in tokens of the longest row that the check runs."""
        return max(len(ids) for ids in [*self.effect.texts, *(sample.ids for sample in self.rows.samples)])


def observe_adapter(run: Run) -> Observed:
    """Measure what the trained adapter changes. Afterwards the base carries no adapter and its layers are freed."""
    texts = check.make_prompts(run.data.samples)
    effect = effects.observe(run.base.model, run.layers, texts, divided=bool(run.base.sharded), on_event=run.emit)
    rows, losses = fidelity.choose_held_out(run.data, run.valid), None
    if not run.base.sharded:
        with attach_temporarily(run.base.model, run.layers):
            losses = fidelity.measure_token_losses(run.base.model, rows, on_event=run.emit)
    run.release_layers()
    return Observed(effect, rows, losses)


def verify(run: Run, folder: Path, seen: Observed, *, beside: bool) -> dict[str, Any]:
    """Load the written adapter with stock PEFT on a fresh base and compare it with the trained model.

    Args:
        beside: the base that it was trained on stays in memory. If memory then runs out, the error is raised, because
            the caller can try again later.

    Raises:
        ExportCheckFailed: they differ.
    """
    run.emit(Stage(stage="verifying", message="Reloading the adapter on the untouched base"))
    gc.collect()
    # Not in parts with DoRA, because PEFT computes norms of the weights when it loads, and cannot do so on parts.
    base = run.base.load_copy(in_parts=not run.lora.use_dora)
    try:
        return _compare(run, folder, seen, base, beside=beside)
    finally:
        free_model(base)


def _compare(run: Run, folder: Path, seen: Observed, base: nn.Module, *, beside: bool) -> dict[str, Any]:
    rows, losses = seen.rows, seen.losses
    result, served = check.check(
        base,
        folder,
        seen.effect,
        source_rank=run.lora.r,
        base_sha256=run.base.sha256,
        shard_copy=run.base.shard_copy,
        on_event=run.emit,
    )
    _emit_result(result, run.emit)
    check.require(result)
    if losses is None:
        result["fidelity"] = fidelity.report_unmeasured(
            rows, dtype=run.base.dtype, reason=fidelity.DIVIDED, on_event=run.emit
        )
        return result
    try:
        result["fidelity"] = fidelity.measure(
            run.base.location.folder,
            folder,
            rows,
            losses,
            served=served,
            dtype=run.base.dtype,
            device=run.base.device,
            quantization=run.lora.quantization,
            on_event=run.emit,
        )
    except check.FAULTS as error:  # for example a base that does not run in bf16; the adapter has passed its check
        if is_machine_failure(error) and (beside or not is_out_of_memory(error)):
            raise
        reason = f"measuring it failed: {check.summarize_error(error)}"
        result["fidelity"] = fidelity.report_unmeasured(rows, dtype=run.base.dtype, reason=reason, on_event=run.emit)
    _require_same_loss(result["fidelity"])
    return result


def _require_same_loss(facts: dict[str, Any]) -> None:
    """In float32, our training loss must equal the loss that stock transformers computes with the merged adapter.

    Otherwise the run has minimized something else than what users get.
    """
    ours, stock = facts["trained_loss"], facts["merged_fp32_loss"]
    if facts["precision"] != "fp32" or ours is None or stock is None:
        return
    if not abs(ours - stock) <= SAME_LOSS * max(1.0, abs(stock)):
        raise ExportCheckFailed(
            f"The loss on held-out rows was {ours:.6g} in the trained model, but is {stock:.6g} as stock transformers"
            " computes it with the adapter merged into the base."
        )


def _emit_result(result: dict[str, Any], on_event: OnEvent) -> None:
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
    run: Run, folder: Path, *, export_check: dict[str, Any] | None, warnings: Sequence[Warned] = ()
) -> None:
    """Write `manifest.json`, which records exactly what ran."""
    data = {"sha256": run.data.sha256, "rows": run.data.rows, "usable": len(run.data.samples)}
    valid = run.valid and {"sha256": run.valid.sha256, "rows": run.valid.rows, "usable": len(run.valid.samples)}
    held = run.base.four_bits and run.base.four_bits.describe(run.base.dtype)
    manifest = {
        "base": {
            "id": run.spec.model.id,
            "root": run.spec.model.root,
            "sha256": run.base.sha256,
            "quantization": held,
        },
        "lora": {**run.lora.model_dump(mode="json"), "scaling": run.lora.scaling},
        "training": run.training.model_dump(mode="json"),
        "seeds": {"run": run.spec.seed, "init": run.report.summary["seed"]},
        "data": {"training": data, "validation": valid, "order": "by keyed hash of seed, epoch and file hash"},
        "plan": run.plan.model_dump(exclude={"kind", "member"}),
        "passes": run.passes.model_dump(exclude={"kept"}),
        "deterministic": run.spec.deterministic,
        "packages": devices.package_versions(),
        "hardware": devices.describe_machine(),
        "init_report": run.report.summary,
        "proof": run.early_check,
        "export_check": export_check,
        "warnings": [found.model_dump() for found in warnings],
    }
    peft_adapter.write_json(folder / "manifest.json", manifest)


def write_spec(run: Run) -> None:
    """Write the spec with every "auto" resolved, and with the passes as they began.

    Memory may make passes smaller later, but a repeated run should begin in the same way.
    """
    passes = {"micro_batch_size": run.passes.begun.rows, "tokens_per_pass": run.passes.begun.tokens}
    update = {"lora": run.lora, "training": run.training, **passes}
    peft_adapter.write_json(run.out / "spec.json", run.spec.model_copy(update=update).model_dump(mode="json"))


def write_metrics(out: Path) -> None:
    """Write the step log as CSV."""
    with (out / "metrics.jsonl").open() as log, (out / "step_metrics.csv").open("w", newline="") as stream:
        write_csv((json.loads(line) for line in log), stream)


def measure_resources(run: Run) -> dict[str, Any]:
    """The resources that the run has used so far, as shown in `job.resources`."""
    seconds = time.monotonic() - run.started
    gpu = devices.gpu_name()
    gpus = run.spec.devices if gpu else 0
    return {
        "gpu_name": gpu,
        "gpus": gpus,
        "processor": platform.machine(),
        "packages": devices.package_versions(),
        "gpu_seconds": round(gpus * seconds, 1),
        "init_gpu_seconds": run.report.summary["seconds"] if gpu else 0.0,
        "peak_memory_bytes": devices.peak_memory_bytes(),
        "micro_batch_size": run.passes.rows,
        "tokens_per_pass": run.passes.tokens,
        "gradient_accumulation_steps": run.passes_of_first_step,
        "oom_retries": run.retries,
        "disk_bytes": sum(p.stat().st_size for p in run.out.rglob("*") if p.is_file()),
    }
