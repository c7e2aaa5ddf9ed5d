"""Chooses passes that fit into memory, before step 1.

An update is tried first. On a GPU two small passes are then measured. Last the largest pass is tried
(`lorainit.train.dry_run`), so that memory does not run out in the middle of a run. If it does not fit, its tokens are
halved, down to one row. After that gradient checkpointing is switched on, which takes more time because it computes
layers again in the backward pass. None of this changes the effective batch, the order of rows or the loss. Events
report it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from lorainit.config.errors import OutOfMemory
from lorainit.config.events import Message
from lorainit.config.resolve import total_steps
from lorainit.context import Run
from lorainit.data.dataset import Sample
from lorainit.model.forward import compiled
from lorainit.model.forward.recompute import recompute
from lorainit.model.layers.group import AdapterSlots
from lorainit.runtime.devices import is_out_of_memory, peak_while, release_memory
from lorainit.runtime.machine_errors import is_failed_device, is_kernel_assert, list_causes
from lorainit.train.dry_run import DryRun, clear_model, plan_dry_runs, try_pass, try_update

PARAM = "training"
# Tokens of the larger of the two measured passes; the smaller one has half. A straight line through both is enough,
# because memory grows linearly beyond a few hundred tokens.
PROBED = 2048
SHARE = 0.8  # share of a GPU that passes may fill; the rest is left for fragmentation and for CUDA itself
STEP = 256  # tokens per pass are a multiple of this, so that small differences in the measurement rarely change them


def fit_to_memory(runs: Sequence[Run]) -> None:
    """Choose passes that fit for runs that share a base, and set up gradient checkpointing and compilation.

    No adapter is attached afterwards.

    Raises:
        OutOfMemory: the optimizer's update does not fit, or not even a pass of one row; on a base that is divided
            between devices: the first pass that is tried does not fit.
    """
    slots, planned = AdapterSlots(runs[0].model), [run.passes.tokens for run in runs]
    if _runs_out_of_memory(slots, runs, partial(try_update, runs)):
        raise _too_much_is_trained()
    switches = [run.training.gradient_checkpointing for run in runs]
    recomputes = _recompute_from_start(slots, runs, switches)
    _measure(slots, runs)
    while failed := _find_first_failure(slots, runs):
        if _halve(runs, failed):
            continue
        if recomputes or False in switches or not failed.learns:
            raise _too_large()
        recomputes = _recompute(slots, runs, "one row did not fit into memory without it", kind="oom_retry")
        if not recomputes:
            raise _too_large()
        for run in runs:
            run.count_shortage()
            run.change_passes(recomputed=True, kept=False)
        # From the tokens that were planned at first, because passes take less memory now and may be larger again.
        _measure(slots, runs, most=planned)
    if runs[0].base.world.in_step:
        _do_not_compile(runs)
    elif not recomputes:
        _compile(slots, runs)


def _halve(runs: Sequence[Run], failed: DryRun) -> bool:
    """Halve the passes of each run that had rows in the pass that failed. Returns whether any could be halved."""
    halve = Run.halve_passes if failed.learns else Run.halve_evaluations
    halved = [halve(runs[who], rows) for who, rows in failed.rows.items()]
    return any(halved)


def _recompute_from_start(slots: AdapterSlots, runs: Sequence[Run], switches: Sequence[bool | str]) -> bool:
    """Switch gradient checkpointing on before any dry run, if there is a reason to. Returns whether it is on.

    A base that is divided between devices always starts with it (unless it is switched off), because its first dry run
    is the only one: a process that runs out of memory leaves the others in the middle of a pass.
    """
    if True in switches:
        return _recompute(slots, runs, "it was asked for", kind="machine")
    if any(run.passes.recomputed for run in runs) and False not in switches:
        return _recompute(slots, runs, "the run that this one resumes from needed it", kind="machine")
    if runs[0].base.world.in_step and False not in switches:
        return _recompute(slots, runs, "the base is divided between devices, so memory is short", kind="machine")
    return False


def _runs_out_of_memory(
    slots: AdapterSlots, runs: Sequence[Run], attempt: Callable[[], None], *, in_step: bool = False
) -> bool:
    """Whether any process runs out of memory in this attempt.

    Args:
        in_step: the processes make this attempt together, each with its part of the base.

    Raises:
        OutOfMemory: memory ran out `in_step`, where the attempt cannot be repeated.
    """
    failed = False
    try:
        attempt()
    except Exception as error:  # torch has one class for a GPU's memory and only a text for the host's
        if not is_out_of_memory(error):
            raise
        if in_step:  # the others wait for this process in the middle of the pass
            raise _too_large_a_part() from error
        failed = True
    if failed:  # not in the except clause, because there the traceback still refers to the tensors to be freed
        clear_model(slots, runs)
        release_memory()
    return runs[0].base.world.any_rank(failed, next(slots.model.parameters()).device)


def _find_first_failure(slots: AdapterSlots, runs: Sequence[Run]) -> DryRun | None:
    for dry_run in plan_dry_runs(runs):
        if _runs_out_of_memory(
            slots, runs, partial(try_pass, slots, runs, dry_run), in_step=runs[0].base.world.in_step
        ):
            return dry_run
    return None


# --- how many tokens fit --------------------------------------------------------------------------


def _measure(slots: AdapterSlots, runs: Sequence[Run], most: Sequence[int] = ()) -> None:
    """Set the tokens per pass to what a GPU holds, calculated from the memory that two small passes take.

    The calculation uses the GPU's total memory and not what is free now, so that the same job has the same passes and
    its results have the same bits. For the same reason the passes of an earlier attempt are kept.

    Args:
        most: the tokens per pass that each run would have with unlimited memory; () = those that it has now.
    """
    device, world = next(slots.model.parameters()).device, runs[0].base.world
    if device.type != "cuda" or all(run.passes.kept or run.passes.rows == 1 for run in runs):
        return
    seen = list[tuple[int, int]]()
    # Rows no longer than half of the larger pass: otherwise both passes could be one row of the same length.
    longest = PROBED // 2 // len(runs)
    for tokens in (PROBED // 2, PROBED):
        rows = [_make_long_rows(run, tokens // len(runs), longest) for run in runs]
        note = partial(_record_peak, seen, slots, runs, DryRun(dict(enumerate(rows))))
        if _runs_out_of_memory(slots, runs, note, in_step=world.in_step):
            _set_tokens(runs, tokens // 2, most)
            return
    (few, small), (many, large) = seen
    each = max(1.0, (large - small) / (many - few))
    found = many + int((SHARE * torch.cuda.mem_get_info(device)[1] - large) / each)
    agreed = torch.tensor(max(STEP, found // STEP * STEP), device=device)
    world.broadcast([agreed])
    _set_tokens(runs, int(agreed), most)


def _record_peak(seen: list[tuple[int, int]], slots: AdapterSlots, runs: Sequence[Run], dry_run: DryRun) -> None:
    """Make a pass, and append its number of tokens and its peak memory in bytes to `seen`."""
    peak = peak_while(lambda: try_pass(slots, runs, dry_run))
    seen.append((sum(len(sample.ids) for rows in dry_run.rows.values() for sample in rows), peak))


def _make_long_rows(run: Run, tokens: int, longest: int) -> list[Sample]:
    """About `tokens` tokens in copies of the longest row, cut to `longest` tokens.

    All tokens are trained, since that takes the most memory.
    """
    row = max(run.data.samples, key=lambda sample: len(sample.ids))
    ids = row.ids[:longest]
    return [Sample(row.line, ids, torch.ones(len(ids), dtype=torch.bool))] * (tokens // len(ids))


def _set_tokens(runs: Sequence[Run], tokens: int, most: Sequence[int]) -> None:
    """Divide these tokens per pass equally among the runs. Less than was planned is reported."""
    for run, planned in zip(runs, most or [run.passes.tokens for run in runs], strict=True):
        if run.passes.kept:
            continue
        part = max(1, min(planned, tokens // len(runs)))
        if part < planned:
            text = f"A pass holds {part:,} tokens at most: two small passes were measured, and no more fit into memory"
            _emit([run], "info", text, kind="machine", tokens_per_pass=part)
        run.change_passes(tokens=part)


# --- gradient checkpointing, compilation, and errors ----------------------------------------------


def _recompute(slots: AdapterSlots, runs: Sequence[Run], why: str, *, kind: str) -> bool:
    works = recompute(slots.model)
    text = "Gradient checkpointing is on" if works else "Gradient checkpointing is not possible with this architecture"
    _emit(runs, "info" if works else "warn", f"{text}: {why}", kind=kind, gradient_checkpointing=works)
    return works


def _too_large() -> OutOfMemory:
    return OutOfMemory(
        "One row of the longest length does not fit into the device's memory. A smaller max_length helps, as do"
        " gradient_checkpointing where it is switched off, lora.quantization nf4, and fewer target modules.",
        param=f"{PARAM}.max_length",
    )


def _too_much_is_trained() -> OutOfMemory:
    return OutOfMemory(
        "The optimizer's update of the adapter does not fit into the device's memory beside the base. A smaller lora.r"
        " helps, as do fewer target modules, and the optimizer adamw where it is another one.",
        param="lora.r",
    )


def _too_large_a_part() -> OutOfMemory:
    return OutOfMemory(
        "The longest batch does not fit into a device's memory beside its part of the base. More devices help, as do a"
        " smaller max_length or batch_size, gradient_checkpointing where it is switched off, and fewer target modules.",
        param=f"{PARAM}.max_length",
    )


def _compile(slots: AdapterSlots, runs: Sequence[Run]) -> None:
    """Compile the decoder layers if it was asked for, or if it saves time. If that fails, go on without and report it.

    A pass is tried, because torch compiles only when the layers are called for the first time.
    """
    wanted = {run.training.compile for run in runs}
    chosen, why = True in wanted, "it was asked for"
    if wanted == {"auto"} and runs[0].base.world.size == 1:
        chosen, why = compiled.is_worth_compiling(slots.model, tokens=sum(_count_tokens(run) for run in runs))
    if not chosen:
        return
    compiled.compile_layers(slots.model)
    try:
        try_pass(slots, runs, next(plan_dry_runs(runs)))
    except Exception as error:  # any error, because torch's compiler and the C++ compiler behind it raise many kinds
        if any(is_failed_device(one) or is_kernel_assert(one) for one in list_causes(error)):
            raise  # the device is broken, so uncompiled layers would fail too
        compiled.undo(slots.model)
        clear_model(slots, runs)
        reason = " ".join(str(error).split())[:300]
        text = f"The decoder layers run uncompiled: compiling them failed with {type(error).__name__}: {reason}"
        _emit(runs, "warn", text, kind="machine", compiled=False)
        return
    _emit(runs, "info", f"The decoder layers are compiled: {why}", kind="machine", compiled=True)


def _do_not_compile(runs: Sequence[Run]) -> None:
    asked = [run for run in runs if run.training.compile is True]
    _emit(asked, "warn", "The decoder layers run uncompiled: the base is divided", kind="machine", compiled=False)


def _count_tokens(run: Run) -> int:
    samples, batch = run.data.samples, run.training.batch_size
    assert batch != "auto"
    per_row = sum(len(s.ids) for s in samples) / len(samples)
    return int(per_row * batch * total_steps(run.training, rows=len(samples)))


def _emit(runs: Sequence[Run], level: str, text: str, **facts: Any) -> None:
    for run in runs:
        event = {"level": level, "message": text, "data": facts}
        run.emit(Message.model_validate(event))
