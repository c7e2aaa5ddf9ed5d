"""Makes passes fit: on a GPU two small ones are measured; an update and the largest pass are tried before step 1.

Running out of memory late is what hurts, so the worst comes first (`lorainit.train.dry_run`). Then a pass's tokens are
halved until it fits, and last the layers are computed again in the backward pass. Neither changes the effective batch,
the order of rows or what is minimized; both are said in an event.
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
from lorainit.runtime.machine_errors import is_failed_device, is_kernel_assert, with_causes
from lorainit.train.dry_run import DryRun, clear_model, plan_dry_runs, try_pass, try_update

PARAM = "training"
# Tokens of the larger of two passes that are measured: beyond a few hundred, memory grows evenly with them.
PROBED = 2048
SHARE = 0.8  # of a GPU that may be full: the rest is for memory in pieces and for CUDA's own
STEP = 256


def fit_to_memory(runs: Sequence[Run]) -> None:
    """Give runs that share a base passes that fit; the model is set up for them and left bare.

    Raises:
        OutOfMemory: not one row fits, whatever is done, or not the optimizer's update; on a base that is divided
            between devices, the first pass that is tried does not.
    """
    slots, planned = AdapterSlots(runs[0].model), [run.passes.tokens for run in runs]
    if _runs_out_of_memory(slots, runs, partial(try_update, runs)):
        raise _too_much_is_trained()
    switches = [run.training.gradient_checkpointing for run in runs]
    recomputes = _recompute_from_start(slots, runs, switches)
    _measure(slots, runs)
    while failed := _find_first_failure(slots, runs):
        if any(len(rows) > 1 for rows in failed.rows.values()):
            _halve(runs, failed)
        elif not (recomputes or False in switches) and failed.learns:
            recomputes = _recompute(slots, runs, "one row did not fit into memory without it", kind="oom_retry")
            if not recomputes:
                raise _too_large()
            for run in runs:
                run.count_shortage()
                run.change_passes(recomputed=True, kept=False)
            _measure(slots, runs, most=planned)
        else:
            raise _too_large()
    if runs[0].base.world.in_step:
        _do_not_compile(runs)
    elif not recomputes:
        _compile(slots, runs)


def _halve(runs: Sequence[Run], failed: DryRun) -> None:
    """Half the tokens to a pass for each run that had more than one row in the pass that failed."""
    for who, rows in failed.rows.items():
        if len(rows) > 1 and failed.learns:
            runs[who].halve_passes(rows)
        elif len(rows) > 1:
            runs[who].halve_evaluations(rows)


def _recompute_from_start(slots: AdapterSlots, runs: Sequence[Run], switches: Sequence[bool | str]) -> bool:
    """Whether layers are computed again before anything was tried: where passes are everybody's there is one try."""
    if True in switches:
        return _recompute(slots, runs, "it was asked for", kind="machine")
    if any(run.passes.recomputed for run in runs) and False not in switches:
        return _recompute(slots, runs, "the run that this one goes on from had to", kind="machine")
    if runs[0].base.world.in_step and False not in switches:
        return _recompute(slots, runs, "memory is short where a base has to be divided", kind="machine")
    return False


def _runs_out_of_memory(
    slots: AdapterSlots, runs: Sequence[Run], attempt: Callable[[], None], *, in_step: bool = False
) -> bool:
    """Whether any process runs out of memory.

    Args:
        in_step: processes make this attempt together, and not side by side.
    """
    failed = False
    try:
        attempt()
    except Exception as error:  # torch has one class for a GPU's memory and only a text for the host's
        if not is_out_of_memory(error):
            raise
        if in_step:  # the others are in the middle of a pass that cannot be finished
            raise _too_large_a_part() from error
        failed = True
    if failed:  # outside of the except clause, whose traceback holds what is to be freed
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
    """Give the runs as many tokens to a pass as a GPU holds, from what two small passes take.

    Of all its memory, not of what is free now: the same job has the same passes, and so the same bits. What an earlier
    attempt had is kept for that reason, too.

    Args:
        most: tokens of each run's passes if the GPU had room for all; () = what they have.
    """
    device, world = next(slots.model.parameters()).device, runs[0].base.world
    if device.type != "cuda" or all(run.passes.kept or run.passes.rows == 1 for run in runs):
        return
    seen = list[tuple[int, int]]()
    longest = PROBED // 2 // len(runs)  # so that the larger pass has about twice the tokens of the smaller one
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
    """Add how many tokens this pass has, and how much memory was in use at most while it was made."""
    peak = peak_while(lambda: try_pass(slots, runs, dry_run))
    seen.append((sum(len(sample.ids) for rows in dry_run.rows.values() for sample in rows), peak))


def _make_long_rows(run: Run, tokens: int, longest: int) -> list[Sample]:
    """About so many tokens in rows as long as the data's longest, if that is not beyond `longest`; all trained."""
    row = max(run.data.samples, key=lambda sample: len(sample.ids))
    ids = row.ids[:longest]
    return [Sample(row.line, ids, torch.ones(len(ids), dtype=torch.bool))] * (tokens // len(ids))


def _set_tokens(runs: Sequence[Run], tokens: int, most: Sequence[int]) -> None:
    """Give the runs their parts of so many tokens to a pass; where that is less than was planned it is reported."""
    for run, planned in zip(runs, most or [run.passes.tokens for run in runs], strict=True):
        if run.passes.kept:
            continue
        part = max(1, min(planned, tokens // len(runs)))
        if part < planned:
            text = f"A pass holds {part:,} tokens at most: what two small ones took shows that no more fit into memory"
            _emit([run], "info", text, kind="machine", tokens_per_pass=part)
        run.change_passes(tokens=part)


# --- what is done about it ----------------------------------------------------------------------


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
    """Compile if it was asked for, or if it pays; where it fails the run goes on without and says so."""
    wanted = {run.training.compile for run in runs}
    chosen, why = True in wanted, "it was asked for"
    if wanted == {"auto"} and runs[0].base.world.size == 1:
        chosen, why = compiled.is_worth_compiling(slots.model, tokens=sum(_count_tokens(run) for run in runs))
    if not chosen:
        return
    compiled.compile_layers(slots.model)
    try:
        try_pass(slots, runs, next(plan_dry_runs(runs)))
    except Exception as error:  # whatever the compiler, or the compiler's compiler, stumbles over
        if any(is_failed_device(one) or is_kernel_assert(one) for one in with_causes(error)):
            raise  # nothing runs there any more, compiled or not
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
