"""Tries a pass and an update before the first step of a run, to see whether they fit into memory.

Otherwise memory might run out late in the run. Parameters, optimizer state and random numbers are unchanged
afterwards, so a run gives the same numbers as without the dry run.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorainit.config.errors import NonFiniteLoss
from lorainit.context import Run
from lorainit.data.dataset import Sample
from lorainit.data.largest import Rows, size_of
from lorainit.model.forward.loss import forward_backward
from lorainit.model.layers.group import AdapterSlots
from lorainit.train.adapter_trainer import clip
from lorainit.train.optimizers import make_optimizer


class DryRun(NamedTuple):
    """One pass to try: its rows by the number of their run, and whether a backward pass belongs to it (`learns`)."""

    rows: dict[int, list[Sample]]
    learns: bool = True


def plan_dry_runs(runs: Sequence[Run]) -> Iterator[DryRun]:
    """The largest training pass, and the largest validation pass of each run that has a larger one.

    A validation pass that is no larger needs no dry run, because it has no backward pass and so takes less memory. Each
    run's validation rows are tried alone, since runs are evaluated one after the other.
    """
    trained = {who: run.largest_pass() for who, run in enumerate(runs)}
    yield DryRun(trained)
    for who, run in enumerate(runs):
        if run.valid is None:
            continue
        packed, largest = run.training_budget.packed, run.largest_evaluation()
        if not size_of(trained[who], packed=packed).covers(size_of(largest, packed=packed)):
            yield DryRun({who: largest}, learns=False)


# --- a pass ---------------------------------------------------------------------------------------


def try_pass(slots: AdapterSlots, runs: Sequence[Run], dry_run: DryRun) -> None:
    """Make the pass, while as much memory is taken as there will be in a real step.

    Raises:
        Exception: whatever the pass raises; `is_out_of_memory` tells whether memory ran out.
    """
    some = [runs[who] for who in dry_run.rows]
    lengths = [sum(len(s.ids) for s in rows) for rows in dry_run.rows.values()]
    slots.put([run.layers for run in some], list(pairwise([0, *accumulate(lengths)])))
    for run in some:
        _set_dropout_key(run, "tried" if dry_run.learns else None)
    objective = some[0].objective
    counts = [sum(map(objective.count, rows)) for rows in dry_run.rows.values()]
    kept = [torch.empty_like(parameter) for parameter in _allocate_like(runs, dry_run)]
    batch = runs[0].base.make_batch([sample for rows in dry_run.rows.values() for sample in rows])
    if dry_run.learns:
        forward_backward(slots.model, objective, batch, counts)
    else:
        with torch.no_grad():
            objective.sums(slots.model, batch, counts)
    del kept
    clear_model(slots, runs)


def _allocate_like(runs: Sequence[Run], dry_run: DryRun) -> list[Tensor]:
    """Parameters to allocate copies of during the dry run, since a real step has them in memory beside the pass.

    For every parameter these are Adam's two moments, and the gradients of earlier passes if a step may take several.
    In an evaluation there are no gradients.
    """
    trained: list[Tensor] = [p for run in runs for p in run.parameters]
    several = dry_run.learns and any(_may_take_several(run) for run in runs)
    return trained * (3 if several else 2)


def _may_take_several(run: Run) -> bool:
    """Whether a step of this run may take more than one pass."""
    assert run.training.batch_size != "auto"
    rows = Rows(run.data.samples, run.training.batch_size)
    kinds = {run.regime(len(sample.ids)) for sample in run.data.samples}
    budget = run.training_budget
    return budget.rows < rows.most or not rows.takes_one_pass(budget) or len(kinds) > 1 or None in kinds


def clear_model(slots: AdapterSlots, runs: Sequence[Run]) -> None:
    """Detach all adapters from the base, and drop their gradients and dropout masks."""
    slots.clear()
    for run in runs:
        _set_dropout_key(run, None)
        for layer in run.layers.values():
            layer.zero_grad()


def _set_dropout_key(run: Run, key: str | None) -> None:
    for layer in run.layers.values():
        layer.dropout.key = key


# --- an update ------------------------------------------------------------------------------------


def try_update(runs: Sequence[Run]) -> None:
    """Sum, clip and apply gradients for every run, twice.

    Twice, because an optimizer allocates its state during its first step, so only the second one takes as much memory
    as later steps. Gradients are zero. A `NonFiniteLoss` is ignored, because step 1 reports factors that an
    optimizer refuses.
    """
    trained = [parameter for run in runs for parameter in run.parameters]
    with _restore_afterwards(trained), suppress(NonFiniteLoss):
        optimizers = [make_optimizer(run.training, run.layers) for run in runs]
        for _ in range(2):
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            for run, optimizer in zip(runs, optimizers, strict=True):
                if run.base.world.size > 1:  # the all-reduce copies all gradients into one tensor
                    torch.cat([p.grad.flatten() for p in run.parameters if p.grad is not None])
                clip(run)
                optimizer.step()
                optimizer.zero_grad()


@contextmanager
def _restore_afterwards(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Restore these parameters afterwards bit by bit, and drop their gradients.

    The copy is on the host, because on the device it would take memory that a real step has.
    """
    before = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.grad = None
                parameter.copy_(value)
