"""From a spec to a `Run`: loads data and model, replaces every "auto" by a number, and checks everything.

The data come before the model, because a large model takes long to load and a wrong file should fail early. What was
decided is reported through `on_event`.
"""

import hashlib
import time
from typing import Any

from torch import nn

from lorainit.config.errors import GroupMismatch
from lorainit.config.events import Message, OnEvent, Plan, Tick
from lorainit.config.model_facts import LeftOut
from lorainit.config.resolve import resolve, steps_per_epoch, total_steps
from lorainit.config.spec import Choice, Hyperparameters, Lora, RunSpec
from lorainit.config.target_modules import describe_left_out
from lorainit.context import Run, RunRequest
from lorainit.data.dataset import Dataset, Sample, name_of, refuse
from lorainit.data.formats.rows import KEPT_PROBLEMS
from lorainit.data.tokens import load_cached
from lorainit.model.base import Base, open_disk_cache
from lorainit.model.layers.experts import ExpertLinear, short_name
from lorainit.model.layers.weight import shape_of
from lorainit.model.load import check_length
from lorainit.model.passes import Passes, go_on
from lorainit.model.source.vocabulary import require_known
from lorainit.model.targets import moe
from lorainit.model.targets.targets import resolve as resolve_targets
from lorainit.runtime import devices


def prepare(request: RunRequest, base: Base, *, sharing: int = 1, known: dict[str, Any] | None = None) -> Run:
    """Load and check everything that the run needs.

    Args:
        base: its weights are loaded here, after the data, unless an earlier run of the group has loaded them.
        sharing: how many runs share a forward pass, and so its memory.
        known: the passes of the checkpoint that the run resumes from, as for `passes.go_on`.

    Raises:
        LorainitError: the run is impossible. A subclass for each cause; `param` names the field at fault.
    """
    spec, emit, started = request.spec, request.on_event, time.monotonic()
    base.require_same(spec)
    lora, choices = spec.lora.resolve()
    asked, decided_here = devices.resolve_precision(spec.training, base.device)
    # Resolved twice: max_length does not depend on the number of rows (1 is a placeholder), but which rows can be used
    # depends on max_length, and the other options depend on the number of usable rows.
    model_ref = spec.model.model_copy(update={"weights": base.weights})
    max_length = resolve(asked, rows=1, model=model_ref, method=lora.method)[0].max_length
    assert max_length != "auto"
    check_length(base.location, max_length)
    data, valid, calibration = _load_data(spec, base, max_length, emit)
    training, more = resolve(asked, rows=len(data.samples), model=model_ref, method=lora.method)
    for choice in [*choices, *decided_here, *more]:
        name = choice.param.removeprefix("training.")
        _emit_choice(emit, f"{name} = {choice.value} ({choice.reason})", **choice.model_dump())

    model = base.load(emit)
    for rows in filter(None, (data, valid, calibration)):
        require_known((sample.ids for sample in rows.samples), base.tokenizer, model)
    if sharing > 1:
        base.require_packing()
    targets, left_out = resolve_targets(model, lora)
    lora = lora.model_copy(update={"left_out": left_out})
    if sharing > 1:
        _refuse_routed(targets)
    _report_left_out(left_out, targets, emit)
    for message in moe.describe(model, targets, lora):
        emit(message)
    assert training.batch_size != "auto"
    passes = go_on(spec, base, known, batch_size=training.batch_size, sharing=sharing)
    plan = _plan(lora, training, data, targets, base=base, passes=passes, choices=decided_here)
    return Run(
        spec=spec,
        out=request.out,
        emit=emit,
        base=base,
        lora=lora,
        training=training,
        data=data,
        valid=valid,
        calibration=calibration,
        targets=targets,
        passes=passes,
        plan=plan,
        alone=sharing == 1,
        started=started,
    )


def _refuse_routed(targets: dict[str, nn.Module]) -> None:
    if any(isinstance(module, ExpertLinear) for module in targets.values()):
        raise GroupMismatch(
            "Adapters of experts see the tokens that the router sends them, not the rows of one run: runs that adapt"
            " experts cannot share a forward pass.",
            param="member",
        )


def _load_data(
    spec: RunSpec, base: Base, max_length: int, on_event: OnEvent
) -> tuple[Dataset, Dataset | None, Dataset | None]:
    def tick(done: int, total: int) -> None:
        on_event(Tick(done=done, total=total))

    def read(path: str | None, param: str) -> Dataset | None:
        if path is None:
            return None
        data = load_cached(
            path,
            base.tokenizer,
            folder=base.location.folder,
            cache=open_disk_cache(spec, "tokens", on_event),
            max_length=max_length,
            append_eos=spec.data.append_eos,
            owner=spec.data.owner,
            on_tick=tick,
        )
        _report_data(data, param, on_event)
        refuse(data, spec.data.on_row_error, param)
        return data

    training = read(spec.data.training, "data.training")
    assert training is not None
    calibration = read(spec.data.calibration, "data.calibration")
    validation = read(spec.data.validation, "data.validation")
    if validation is not None:
        _report_overlap(training, validation, on_event)
    return training, validation, calibration


def _report_overlap(training: Dataset, validation: Dataset, on_event: OnEvent) -> None:
    """Warn about validation rows that are also training rows, because their loss shows memory, not generalization."""
    learned = set(map(_digest, training.samples))
    known = sum(_digest(sample) in learned for sample in validation.samples)
    if known:
        text = (
            f"{known} of {len(validation.samples)} rows of the validation file are rows of the training file too: their"
            " loss shows what the model has memorized, not how well it generalizes."
        )
        data = {"kind": "data", "file": "data.validation", "warnings": {"overlaps_validation_file": known}}
        on_event(Message(level="warn", message=text, data=data))


def _digest(sample: Sample) -> bytes:
    return hashlib.blake2b(sample.ids.numpy().tobytes(), digest_size=16).digest()


def _report_data(data: Dataset, param: str, on_event: OnEvent) -> None:
    skipped = data.rows - len(data.samples)
    text = f"{len(data.samples)} of {data.rows} rows of the {name_of(param)} are used"
    text += f", {data.trained_tokens} trained tokens per epoch"
    text += f", {data.truncated} rows cut at the maximum length" if data.truncated else ""
    facts = {
        "file": param,
        "rows": data.rows,
        "usable": len(data.samples),
        "truncated": data.truncated,
        "warnings": dict(data.warnings),
        "errors": [p.model_dump() for p in data.problems[:KEPT_PROBLEMS]],
    }
    level = "warn" if skipped or data.truncated else "info"
    on_event(Message.model_validate({"level": level, "message": text, "data": {"kind": "data", **facts}}))
    for remark in data.remarks:
        count = data.warnings[remark.code]
        more = f" ({count} rows of the {name_of(param)})" if count > 1 else ""
        facts = {"kind": "data", "file": param, "rows": count, **remark.model_dump()}
        on_event(Message(level="warn", message=f"{remark.message}{more}", data=facts))


def _report_left_out(left_out: list[LeftOut], targets: dict[str, nn.Module], on_event: OnEvent) -> None:
    if left_out:
        adapted = sum(out * n for out, n in map(shape_of, targets.values()))
        data = {"kind": "targets", "left_out": [layer.model_dump() for layer in left_out]}
        on_event(Message(level="warn", message=describe_left_out(left_out, adapted), data=data))


def _emit_choice(on_event: OnEvent, text: str, **facts: Any) -> None:
    on_event(Message(message=text, data={"kind": "data", **facts}))


def _plan(
    lora: Lora,
    training: Hyperparameters,
    data: Dataset,
    targets: dict[str, nn.Module],
    *,
    base: Base,
    passes: Passes,
    choices: list[Choice],
) -> Plan:
    assert training.batch_size != "auto"
    return Plan(
        total_steps=total_steps(training, rows=len(data.samples)),
        steps_per_epoch=steps_per_epoch(len(data.samples), training.batch_size),
        rows=len(data.samples),
        trained_tokens_per_epoch=data.trained_tokens,
        micro_batch_size=passes.rows,
        tokens_per_pass=passes.tokens,
        modules=len(targets),
        trainable_parameters=sum(lora.count_parameters(*shape_of(m)) for m in targets.values()),
        trainable_parameters_estimated=lora.method.export_rank == "per module",
        target_modules=list(dict.fromkeys(short_name(name, module) for name, module in targets.items())),
        left_out=lora.left_out,
        device=str(base.device),
        precision=training.precision,
        choices=choices,
    )
