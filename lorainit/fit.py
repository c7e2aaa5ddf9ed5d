"""Makes a step fit: the longest batch is tried, forward and backward, before the first step.

Running out of memory late is what hurts, so the worst comes first. Then the micro-batch is halved
until it fits, and last the layers are computed again in the backward pass. Neither changes the
effective batch, the order of rows or what is minimized; both are said in an event.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, groupby, islice, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorainit import compiled
from lorainit.batches import Batch, batches
from lorainit.course import Member
from lorainit.data import Sample
from lorainit.errors import OutOfMemory
from lorainit.events import Message
from lorainit.group import Stand
from lorainit.hardware import is_out_of_memory, return_memory
from lorainit.loss import tallies
from lorainit.recompute import recompute
from lorainit.resolve import total_steps
from lorainit.world import World

Lay = Callable[[Sequence[Sample]], Batch]
PARAM = "training"


class Fitted(NamedTuple):
    """The members with micro-batches that fit, and how often memory had run out before."""

    members: list[Member]
    retries: int


def fit(model: nn.Module, members: Sequence[Member], *, lay: Lay, world: World) -> Fitted:
    """Set the model and its members up for the run; the model is left bare.

    Raises:
        OutOfMemory: not one row fits, whatever is done; on a base that is divided between devices, the first try.
    """
    stand, members, retries = Stand(model), list(members), 0
    switches = [member.recipe.gradient_checkpointing for member in members]
    recomputes = _from_the_start(stand, members, switches, world)
    while _fails(stand, members, lay, world):
        retries += 1
        if any(member.micro_batch_size > 1 for member in members):
            members = [replace(m, micro_batch_size=(m.micro_batch_size + 1) // 2) for m in members]
            for member in members:
                _say_smaller(member)
        elif not recomputes and False not in switches:
            recomputes = _recompute(stand, members, "one row did not fit into memory without it", kind="oom_retry")
            if not recomputes:
                raise _too_large()
        else:
            raise _too_large()
    if world.in_step:
        _do_not_compile(members)
    elif not recomputes:
        _compile(stand, members, lay, world)
    return Fitted(members, retries)


def _from_the_start(stand: Stand, members: Sequence[Member], switches: Sequence[bool | str], world: World) -> bool:
    """Whether layers are computed again before anything was tried: where passes are everybody's there is one try."""
    if True in switches:
        return _recompute(stand, members, "it was asked for", kind="machine")
    if world.in_step and False not in switches:
        return _recompute(stand, members, "memory is short where a base has to be divided", kind="machine")
    return False


def _fails(stand: Stand, members: Sequence[Member], lay: Lay, world: World) -> bool:
    """Whether any process runs out of memory on the longest batch."""
    failed = False
    try:
        _try(stand, members, lay)
    except Exception as error:  # torch has one class for a GPU's memory and only a text for the host's
        if not is_out_of_memory(error):
            raise
        if world.in_step:  # the others are in the middle of a pass that cannot be finished
            raise _too_large_a_part() from error
        failed = True
    if failed:  # outside of the except clause, whose traceback holds what is to be freed
        _forget(stand, members)
        return_memory()
    return world.anybody(failed, next(stand.model.parameters()).device)


def _try(stand: Stand, members: Sequence[Member], lay: Lay) -> None:
    rows = [_longest(member) for member in members]
    stand.put([m.layers for m in members], list(pairwise([0, *accumulate(sum(len(s.ids) for s in r) for r in rows)])))
    for member in members:
        _drop(member, "tried")
    counts = [sum(int(s.trained[1:].sum()) for s in some) for some in rows]
    kept = [torch.empty_like(p) for member in members for p in _kept(member)]
    parts = tallies(stand.model, lay([sample for some in rows for sample in some]), counts)
    torch.autograd.backward(torch.stack([part.loss for part in parts]).sum())
    del kept
    _forget(stand, members)


def _kept(member: Member) -> list[Tensor]:
    """Of what there will be another one beside a pass: Adam's two moments, and gradients of the pieces before it."""
    trained: list[Tensor] = [p for layer in member.layers.values() for p in layer.trained().values()]
    assert member.recipe.batch_size != "auto"
    return trained * (3 if member.recipe.batch_size > member.micro_batch_size else 2)


def _longest(member: Member) -> list[Sample]:
    """The largest micro-batch that the data can make, in rows times the longest of them."""
    size, found = member.micro_batch_size, list[list[Sample]]()
    for _, rows in groupby(sorted(member.data.samples, key=lambda s: -len(s.ids)), lambda s: member.regime(len(s.ids))):
        found += batches(list(islice(rows, size)), size, member.regime)
    return max(found, key=lambda rows: len(rows) * len(rows[0].ids))


def _drop(member: Member, key: str | None) -> None:
    for layer in member.layers.values():
        layer.dropout.key = key


def _forget(stand: Stand, members: Sequence[Member]) -> None:
    stand.clear()
    for member in members:
        _drop(member, None)
        for layer in member.layers.values():
            layer.zero_grad()


# --- what is done about it ----------------------------------------------------------------------


def _say_smaller(member: Member) -> None:
    micro, batch = member.micro_batch_size, member.recipe.batch_size
    assert batch != "auto"
    pieces = -(-batch // micro)
    text = f"The longest batch did not fit into memory: {pieces} micro-batches of {micro} rows, same effective batch"
    _tell([member], "warn", text, kind="oom_retry", micro_batch_size=micro, gradient_accumulation_steps=pieces)


def _recompute(stand: Stand, members: Sequence[Member], why: str, *, kind: str) -> bool:
    works = recompute(stand.model)
    text = "Gradient checkpointing is on" if works else "Gradient checkpointing is not possible with this architecture"
    _tell(members, "info" if works else "warn", f"{text}: {why}", kind=kind, gradient_checkpointing=works)
    return works


def _too_large() -> OutOfMemory:
    return OutOfMemory(
        "One row of the longest length does not fit into the device's memory. A smaller max_length helps, as do"
        " gradient_checkpointing where it is switched off, lora.quantization nf4, and fewer target modules.",
        param=f"{PARAM}.max_length",
    )


def _too_large_a_part() -> OutOfMemory:
    return OutOfMemory(
        "The longest batch does not fit into a device's memory beside its part of the base. More devices help, as do a"
        " smaller max_length or batch_size, gradient_checkpointing where it is switched off, and fewer target modules.",
        param=f"{PARAM}.max_length",
    )


def _compile(stand: Stand, members: Sequence[Member], lay: Lay, world: World) -> None:
    """Compile if it was asked for, or if it pays; where it fails the run goes on without and says so."""
    wanted = {member.recipe.compile for member in members}
    chosen, why = True in wanted, "it was asked for"
    if wanted == {"auto"} and world.size == 1:
        chosen, why = compiled.pays(stand.model, tokens=sum(_tokens(member) for member in members))
    if not chosen:
        return
    compiled.compile_layers(stand.model)
    try:
        _try(stand, members, lay)
    except Exception as error:  # whatever the compiler, or the compiler's compiler, stumbles over
        compiled.undo(stand.model)
        _forget(stand, members)
        reason = " ".join(str(error).split())[:300]
        text = f"The decoder layers run uncompiled: compiling them failed with {type(error).__name__}: {reason}"
        _tell(members, "warn", text, kind="machine", compiled=False)
        return
    _tell(members, "info", f"The decoder layers are compiled: {why}", kind="machine", compiled=True)


def _do_not_compile(members: Sequence[Member]) -> None:
    asked = [member for member in members if member.recipe.compile is True]
    _tell(asked, "warn", "The decoder layers run uncompiled: the base is divided", kind="machine", compiled=False)


def _tokens(member: Member) -> int:
    samples, batch = member.data.samples, member.recipe.batch_size
    assert batch != "auto"
    per_row = sum(len(s.ids) for s in samples) / len(samples)
    return int(per_row * batch * total_steps(member.recipe, rows=len(samples)))


def _tell(members: Sequence[Member], level: str, text: str, **facts: Any) -> None:
    for member in members:
        event = {"level": level, "message": text, "data": facts}
        member.on_event(Message.model_validate(event))
