"""From a spec to everything a run works with, resolved and checked: data first, the model last.

What can be refused is refused here, before the slow parts. Says what it decided through `on_event`.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorainit import hardware
from lorainit.data import Dataset, pad_id
from lorainit.digest import known_sha256, require_whole
from lorainit.events import Event, Message, Plan, Tick
from lorainit.layer import shape_of
from lorainit.model import check_length, load_model, load_tokenizer, locate
from lorainit.quantize import require_library
from lorainit.resolve import resolve, steps_per_epoch, total_steps
from lorainit.spec import Hyperparameters, Lora, RunSpec
from lorainit.store import Store
from lorainit.targets import check_rank, find_targets
from lorainit.tokens import load_kept

OnEvent = Callable[[Event], None]

# Rows × tokens of one forward pass when the spec leaves the micro-batch to us: the logits of a large
# vocabulary are what fills memory first (2048 × 49152 × 4 bytes = 0.4 GB, held about three times).
TOKENS_PER_PASS = {"cpu": 2048, "cuda": 16384}
MAX_ROWS_PER_PASS = {"cpu": 8, "cuda": 64}


@dataclass
class Job:
    """What one run works with, everything resolved. `model` carries the adapter once it is initialized."""

    spec: RunSpec
    lora: Lora
    training: Hyperparameters
    folder: Path
    base_sha256: str
    tokenizer: Any
    data: Dataset
    valid: Dataset | None
    calibration: Dataset | None
    model: nn.Module
    targets: dict[str, nn.Module]
    dtype: torch.dtype
    device: torch.device
    plan: Plan

    @property
    def pad(self) -> int:
        """The padding token's id."""
        return pad_id(self.tokenizer)

    @property
    def recipe(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that wrote the checkpoint."""
        resolved = {
            "lora": self.lora.model_dump(mode="json"),
            "training": self.training.model_dump(mode="json"),
            "seed": self.spec.seed,
            "precision": self.plan.precision,
        }
        return {
            "spec": hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest(),
            "data": self.data.sha256,
            "validation": self.valid.sha256 if self.valid else None,
            "calibration": self.calibration.sha256 if self.calibration else None,
            "base": self.base_sha256,
        }


def prepare(spec: RunSpec, out: Path, on_event: OnEvent) -> Job:
    """Load and check everything.

    Args:
        out: where a GGUF base is converted to when the spec names no cache.

    Raises:
        LorainitError: whatever makes the run impossible, with the field at fault.
    """
    lora, choices = spec.lora.resolved()
    if lora.quantization:
        require_library()
    device = hardware.pick_device()
    dtype = hardware.pick_dtype(spec.precision, device)
    location = locate(spec.model.source, cache=Path(spec.cache) if spec.cache else out / "base")
    tokenizer = load_tokenizer(location.folder)

    # max_length does not depend on the number of rows, and the number of usable rows depends on it.
    max_length = resolve(spec.training, rows=1, model=spec.model, method=lora.method)[0].max_length
    assert max_length != "auto"
    check_length(location, max_length)
    data, valid, calibration = _load_data(spec, tokenizer, location.folder, max_length, on_event)
    training, more = resolve(spec.training, rows=len(data.samples), model=spec.model, method=lora.method)
    for choice in [*choices, *more]:
        _say(on_event, f"{choice.param} = {choice.value} ({choice.reason})", **choice.model_dump())

    model = load_model(location.folder, dtype=dtype, device=device, quantization=lora.quantization)
    targets = find_targets(model, lora.target_modules)
    check_rank(targets, lora.r)
    plan = _plan(spec, lora, training, data, targets, device=device, dtype=dtype)
    digest = known_sha256(location.folder, store(spec, "bases", on_event))
    require_whole(location.folder, digest)
    return Job(
        spec,
        lora,
        training,
        location.folder,
        digest,
        tokenizer,
        data,
        valid,
        calibration,
        model,
        targets,
        dtype,
        device,
        plan,
    )


def store(spec: RunSpec, kind: str, on_event: OnEvent) -> Store:
    """What earlier runs found out, one of `store.KINDS`; a run without a cache folder keeps nothing."""
    return Store(Path(spec.cache or "") / kind, spec.cache_limit_bytes if spec.cache else 0, on_event)


def _load_data(
    spec: RunSpec, tokenizer: Any, folder: Path, max_length: int, on_event: OnEvent
) -> tuple[Dataset, Dataset | None, Dataset | None]:
    def tick(done: int, total: int) -> None:
        on_event(Tick(done=done, total=total))

    def read(path: str | None, param: str) -> Dataset | None:
        if path is None:
            return None
        data = load_kept(
            path,
            tokenizer,
            folder=folder,
            store=store(spec, "tokens", on_event),
            max_length=max_length,
            on_row_error=spec.data.on_row_error,
            param=param,
            on_tick=tick,
        )
        _report_data(data, param, on_event)
        return data

    training = read(spec.data.training, "training_file")
    assert training is not None
    calibration = read(spec.data.calibration, "lora.init.calibration_file")
    return training, read(spec.data.validation, "validation_file"), calibration


def _report_data(data: Dataset, param: str, on_event: OnEvent) -> None:
    skipped = data.rows - len(data.samples)
    text = f"{len(data.samples)} of {data.rows} rows of the {param.replace('_', ' ')} are used"
    text += f", {data.trained_tokens} trained tokens per pass"
    text += f", {data.truncated} rows cut at the maximum length" if data.truncated else ""
    facts = {
        "file": param,
        "rows": data.rows,
        "usable": len(data.samples),
        "truncated": data.truncated,
        "warnings": dict(data.warnings),
        "errors": [p.model_dump() for p in data.problems[:20]],
    }
    level = "warn" if skipped or data.truncated else "info"
    on_event(Message.model_validate({"level": level, "message": text, "data": {"kind": "data", **facts}}))


def _say(on_event: OnEvent, text: str, **facts: Any) -> None:
    on_event(Message(message=text, data={"kind": "data", **facts}))


def _plan(
    spec: RunSpec,
    lora: Lora,
    training: Hyperparameters,
    data: Dataset,
    targets: dict[str, nn.Module],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Plan:
    assert training.batch_size != "auto"
    longest = max(len(s.ids) for s in data.samples)
    fitting = min(MAX_ROWS_PER_PASS[device.type], max(1, TOKENS_PER_PASS[device.type] // longest))
    micro = min(spec.micro_batch_size or fitting, training.batch_size)
    return Plan(
        total_steps=total_steps(training, rows=len(data.samples)),
        steps_per_epoch=steps_per_epoch(len(data.samples), training.batch_size),
        rows=len(data.samples),
        trained_tokens_per_epoch=data.trained_tokens,
        micro_batch_size=micro,
        gradient_accumulation_steps=math.ceil(training.batch_size / micro),
        modules=len(targets),
        trainable_parameters=sum(lora.parameters(*shape_of(m)) for m in targets.values()),
        trainable_parameters_estimated=lora.method.export_rank == "per module",
        target_modules=list(dict.fromkeys(name.rpartition(".")[2] for name in targets)),
        device=str(device),
        precision=hardware.precision_name(dtype),
    )
