"""Makes passes fit: on a GPU two small ones are measured; an update and the largest pass are tried before step 1.

Running out of memory late is what hurts, so the worst comes first (`lorainit.train.dry_run`). Then a pass's tokens are
halved until it fits, and last the layers are computed again in the backward pass. Neither changes the effective batch,
the order of rows or what is minimized; both are said in an event.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lorainit.config.errors import OutOfMemory
from lorainit.config.events import Message
from lorainit.config.resolve import total_steps
from lorainit.data.dataset import Sample
from lorainit.model.forward import compiled
from lorainit.model.forward.recompute import recompute
from lorainit.model.layers.group import AdapterSlots
from lorainit.runtime.devices import is_out_of_memory, peak_while, release_memory
from lorainit.runtime.distributed.world import World
from lorainit.runtime.machine_errors import is_failed_device, is_kernel_assert, with_causes
from lorainit.train.dry_run import DryRun, MakeBatch, clear_model, plan_dry_runs, try_pass, try_update
from lorainit.train.member import Member, halve_tokens, shrink_evaluations

PARAM = "training"
# Tokens of the larger of two passes that are measured: beyond a few hundred, memory grows evenly with them.
PROBED = 2048
SHARE = 0.8  # of a GPU that may be full: the rest is for memory in pieces and for CUDA's own
STEP = 256


def fit_to_memory(model: nn.Module, members: Sequence[Member], *, make_batch: MakeBatch, world: World) -> list[Member]:
    """The members with passes that fit; the model is set up for the run and left bare.

    Raises:
        OutOfMemory: not one row fits, whatever is done, or not the optimizer's update; on a base that is divided
            between devices, the first pass that is tried does not.
    """
    slots, planned = AdapterSlots(model), list(members)
    if _runs_out_of_memory(slots, members, world, partial(try_update, members, world)):
        raise _too_much_is_trained()
    switches = [member.recipe.gradient_checkpointing for member in members]
    recomputes = _recompute_from_start(slots, members, switches, world)
    members = _measure_tokens(slots, planned, make_batch, world)
    while failed := _find_first_failure(slots, members, make_batch, world):
        if any(len(rows) > 1 for rows in failed.rows.values()):
            smaller = halve_tokens if failed.learns else shrink_evaluations
            members = [
                smaller(m, failed.rows[who]) if len(failed.rows.get(who, ())) > 1 else m
                for who, m in enumerate(members)
            ]
        elif not (recomputes or False in switches) and failed.learns:
            recomputes = _recompute(slots, members, "one row did not fit into memory without it", kind="oom_retry")
            if not recomputes:
                raise _too_large()
            for member in members:
                member.on_shortage()
                member.on_recompute()
            members = [replace(member, keeps_budget=False) for member in members]
            members = _measure_tokens(slots, members, make_batch, world, most=[m.budget.tokens for m in planned])
        else:
            raise _too_large()
    if world.in_step:
        _do_not_compile(members)
    elif not recomputes:
        _compile(slots, members, make_batch, world)
    return list(members)


def _recompute_from_start(
    slots: AdapterSlots, members: Sequence[Member], switches: Sequence[bool | str], world: World
) -> bool:
    """Whether layers are computed again before anything was tried: where passes are everybody's there is one try."""
    if True in switches:
        return _recompute(slots, members, "it was asked for", kind="machine")
    if any(member.recomputes for member in members) and False not in switches:
        return _recompute(slots, members, "the run that this one goes on from had to", kind="machine")
    if world.in_step and False not in switches:
        return _recompute(slots, members, "memory is short where a base has to be divided", kind="machine")
    return False


def _runs_out_of_memory(
    slots: AdapterSlots, members: Sequence[Member], world: World, attempt: Callable[[], None], *, in_step: bool = False
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
        clear_model(slots, members)
        release_memory()
    return world.any_rank(failed, next(slots.model.parameters()).device)


def _find_first_failure(
    slots: AdapterSlots, members: Sequence[Member], make_batch: MakeBatch, world: World
) -> DryRun | None:
    for dry_run in plan_dry_runs(members):
        if _runs_out_of_memory(
            slots, members, world, partial(try_pass, slots, members, dry_run, make_batch), in_step=world.in_step
        ):
            return dry_run
    return None


# --- how many tokens fit --------------------------------------------------------------------------


def _measure_tokens(
    slots: AdapterSlots, members: Sequence[Member], make_batch: MakeBatch, world: World, most: Sequence[int] = ()
) -> Sequence[Member]:
    """The members with as many tokens to a pass as a GPU holds, from what two small passes take; else as they are.

    Of all its memory, not of what is free now: the same job has the same passes, and so the same bits. What an earlier
    attempt had is kept for that reason, too.

    Args:
        most: tokens of each member's passes if the GPU had room for all; () = what they have.
    """
    device = next(slots.model.parameters()).device
    if device.type != "cuda" or all(m.keeps_budget or m.budget.rows == 1 for m in members):
        return members
    seen = list[tuple[int, int]]()
    longest = PROBED // 2 // len(members)  # so that the larger pass has about twice the tokens of the smaller one
    for tokens in (PROBED // 2, PROBED):
        rows = [_make_long_rows(member, tokens // len(members), longest) for member in members]
        dry_run = DryRun(dict(enumerate(rows)))
        note = partial(_record_peak, seen, slots, members, dry_run, make_batch)
        if _runs_out_of_memory(slots, members, world, note, in_step=world.in_step):
            return _limit_tokens(members, tokens // 2, most)
    (few, small), (many, large) = seen
    each = max(1.0, (large - small) / (many - few))
    found = many + int((SHARE * torch.cuda.mem_get_info(device)[1] - large) / each)
    agreed = torch.tensor(max(STEP, found // STEP * STEP), device=device)
    world.broadcast([agreed])
    return _limit_tokens(members, int(agreed), most)


def _record_peak(
    seen: list[tuple[int, int]], slots: AdapterSlots, members: Sequence[Member], dry_run: DryRun, make_batch: MakeBatch
) -> None:
    """Add how many tokens this pass has, and how much memory was in use at most while it was made."""
    peak = peak_while(lambda: try_pass(slots, members, dry_run, make_batch))
    seen.append((sum(len(sample.ids) for rows in dry_run.rows.values() for sample in rows), peak))


def _make_long_rows(member: Member, tokens: int, longest: int) -> list[Sample]:
    """About so many tokens in rows as long as the data's longest, if that is not beyond `longest`; all trained."""
    row = max(member.data.samples, key=lambda sample: len(sample.ids))
    ids = row.ids[:longest]
    return [Sample(row.line, ids, torch.ones(len(ids), dtype=torch.bool))] * (tokens // len(ids))


def _limit_tokens(members: Sequence[Member], tokens: int, most: Sequence[int]) -> list[Member]:
    """The members with their parts of so many tokens to a pass; where that is less than was planned it is said."""
    found = []
    for member, planned in zip(members, most or [m.budget.tokens for m in members], strict=True):
        if member.keeps_budget:
            found.append(member)
            continue
        part = max(1, min(planned, tokens // len(members)))
        if part < planned:
            text = f"A pass holds {part:,} tokens at most: what two small ones took shows that no more fit into memory"
            _emit([member], "info", text, kind="machine", tokens_per_pass=part)
        member.on_budget(part)
        found.append(replace(member, budget=member.budget._replace(tokens=part)))
    return found


# --- what is done about it ----------------------------------------------------------------------


def _recompute(slots: AdapterSlots, members: Sequence[Member], why: str, *, kind: str) -> bool:
    works = recompute(slots.model)
    text = "Gradient checkpointing is on" if works else "Gradient checkpointing is not possible with this architecture"
    _emit(members, "info" if works else "warn", f"{text}: {why}", kind=kind, gradient_checkpointing=works)
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


def _compile(slots: AdapterSlots, members: Sequence[Member], make_batch: MakeBatch, world: World) -> None:
    """Compile if it was asked for, or if it pays; where it fails the run goes on without and says so."""
    wanted = {member.recipe.compile for member in members}
    chosen, why = True in wanted, "it was asked for"
    if wanted == {"auto"} and world.size == 1:
        chosen, why = compiled.is_worth_compiling(slots.model, tokens=sum(_count_tokens(member) for member in members))
    if not chosen:
        return
    compiled.compile_layers(slots.model)
    try:
        try_pass(slots, members, next(plan_dry_runs(members)), make_batch)
    except Exception as error:  # whatever the compiler, or the compiler's compiler, stumbles over
        if any(is_failed_device(one) or is_kernel_assert(one) for one in with_causes(error)):
            raise  # nothing runs there any more, compiled or not
        compiled.undo(slots.model)
        clear_model(slots, members)
        reason = " ".join(str(error).split())[:300]
        text = f"The decoder layers run uncompiled: compiling them failed with {type(error).__name__}: {reason}"
        _emit(members, "warn", text, kind="machine", compiled=False)
        return
    _emit(members, "info", f"The decoder layers are compiled: {why}", kind="machine", compiled=True)


def _do_not_compile(members: Sequence[Member]) -> None:
    asked = [member for member in members if member.recipe.compile is True]
    _emit(asked, "warn", "The decoder layers run uncompiled: the base is divided", kind="machine", compiled=False)


def _count_tokens(member: Member) -> int:
    samples, batch = member.data.samples, member.recipe.batch_size
    assert batch != "auto"
    per_row = sum(len(s.ids) for s in samples) / len(samples)
    return int(per_row * batch * total_steps(member.recipe, rows=len(samples)))


def _emit(members: Sequence[Member], level: str, text: str, **facts: Any) -> None:
    for member in members:
        event = {"level": level, "message": text, "data": facts}
        member.on_event(Message.model_validate(event))
