"""A pass and an update as a run makes them, tried before its first step: what they take of memory, and nothing else.

Nothing of it stays: what is trained, the optimizer's state and random numbers are afterwards as if it had not been.
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
    """A pass: the rows of some runs, by their number, and whether they learn from it."""

    rows: dict[int, list[Sample]]
    learns: bool = True


def plan_dry_runs(runs: Sequence[Run]) -> Iterator[DryRun]:
    """A pass that no pass of training is larger than, and such a one of everybody's validation, unless it is smaller.

    Each run's validation rows go alone, and are not learned from, which takes less.
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
    """Forward and, where they learn from it, backward, beside what lies there by then."""
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
    """What there will be another one of beside this pass: of everybody, Adam's moments and gradients of passes before.

    While validation rows are looked at there are no gradients.
    """
    trained: list[Tensor] = [p for run in runs for p in run.parameters]
    several = dry_run.learns and any(_may_take_several(run) for run in runs)
    return trained * (3 if several else 2)


def _may_take_several(run: Run) -> bool:
    """Whether some step of its may take more than one pass."""
    assert run.training.batch_size != "auto"
    rows = Rows(run.data.samples, run.training.batch_size)
    kinds = {run.regime(len(sample.ids)) for sample in run.data.samples}
    budget = run.training_budget
    return budget.rows < rows.most or not rows.takes_one_pass(budget) or len(kinds) > 1 or None in kinds


def clear_model(slots: AdapterSlots, runs: Sequence[Run]) -> None:
    """The bare base again, and no gradients."""
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
    """Everybody's gradients are summed, clipped and used, twice: at first an optimizer makes its state on the way.

    Numbers are not tried: gradients are zero here, and factors that an optimizer refuses are told by step 1.
    """
    trained = [parameter for run in runs for parameter in run.parameters]
    with _restore_afterwards(trained), suppress(NonFiniteLoss):
        optimizers = [make_optimizer(run.training, run.layers) for run in runs]
        for _ in range(2):
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            for run, optimizer in zip(runs, optimizers, strict=True):
                if run.base.world.size > 1:  # their sum over all processes is made in one piece
                    torch.cat([p.grad.flatten() for p in run.parameters if p.grad is not None])
                clip(run)
                optimizer.step()
                optimizer.zero_grad()


@contextmanager
def _restore_afterwards(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Afterwards these have the bits that they had, from a copy on the host, and no gradients."""
    before = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.grad = None
                parameter.copy_(value)
