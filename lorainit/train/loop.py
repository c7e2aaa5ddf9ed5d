"""The training loop: one base and one forward pass for one adapter or several.

Each adapter has its own rows, optimizer and log (`lorainit.train.adapter_trainer`). Only the base and the passes are
shared.
"""

import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from lorainit.config.errors import LorainitError, Stopped
from lorainit.config.events import Message, Stage, Tick
from lorainit.context import Run
from lorainit.data.batches import split_into_batches
from lorainit.data.dataset import Sample
from lorainit.model.forward.loss import Sums, add_sums, forward_backward, zero_sums
from lorainit.model.layers.group import AdapterSlots
from lorainit.runtime.distributed import run_errors
from lorainit.runtime.retry import retry_until_it_fits
from lorainit.train.adapter_trainer import AdapterTrainer, Evaluate
from lorainit.train.checkpoint import Progress, Restored

End = Progress | LorainitError


def train(
    runs: Sequence[Run], resumed: list[Restored | None], *, write_adapter: Callable[[Run, Path], None]
) -> Generator[list[tuple[int, End]], None, None]:
    """Train the adapters of `runs` in place, on the base that they share. No adapter may be attached to it.

    Yields the runs that have just ended, as (index, progress) or (index, error). An error in a run's own work (an
    evaluation, a checkpoint) ends only that run. At a yield no adapter is attached, so the caller may use the model.

    Args:
        resumed: the checkpoint that each of them resumes from, if it does. Each is replaced by None once it is loaded,
            because its tensors would otherwise stay in memory until the last run ends.
        write_adapter: as for `AdapterTrainer`.

    Raises:
        Stopped: from `emit`, or thrown in by the caller. Each run's steps are written to a checkpoint first.
        Exception: an error in a shared pass, or what `emit` raises if it is not a `LorainitError`: all runs end.
    """
    slots = AdapterSlots(runs[0].model)
    trainers, ended = dict[int, AdapterTrainer](), list[tuple[int, End]]()

    def begin(who: int) -> None:
        try:
            restored, resumed[who] = resumed[who], None
            trainers[who] = AdapterTrainer(runs[who], write_adapter=write_adapter, resumed=restored)
        except Exception as error:
            ended.append((who, run_errors.to_run_error(error, alone=len(runs) == 1)))
        else:
            attempt(who, trainers[who].begin)

    def attempt(who: int, work: Callable[[Evaluate], None]) -> None:
        trainer = trainers[who]
        try:
            work(lambda samples: evaluate(slots, trainer, samples))
            if trainer.is_over:
                ended.append((who, trainer.progress))
        except Exception as error:
            ended.append((who, run_errors.to_run_error(error, alone=len(runs) == 1)))
        if ended and ended[-1][0] == who:
            del trainers[who]

    try:
        # By index, because a loop variable with a trainer in it would keep the optimizer of an ended run in memory.
        for who in range(len(runs)):
            begin(who)
        while trainers or ended:
            slots.clear()
            if ended:
                yield ended
            ended = []
            while trainers and not ended:
                _compute_gradients(slots, list(trainers.values()))
                poisoned = [who for who, trainer in trainers.items() if len(trainers) > 1 and trainer.is_poisoned()]
                # A non-finite adapter can spoil the rows of the others in the same pass (seen in bf16). So it ends,
                # and the others repeat the step without it.
                for who in poisoned:
                    attempt(who, trainers[who].give_up)
                for who in list(trainers):
                    again = partial(_compute_gradients, slots, [trainers[who]])
                    finish = partial(trainers[who].finish_step, pass_again=again)
                    attempt(who, trainers[who].repeat_step if poisoned else finish)
                    del again, finish  # both refer to the trainer, which has to be freed if its run has ended
    except Stopped:
        _save_all(list(trainers.values()))
        raise
    finally:
        slots.clear()


def _save_all(trainers: Sequence[AdapterTrainer]) -> None:
    """Write a checkpoint of each. If one of several fails, this is reported, so that the others are still written."""
    for trainer in trainers:
        try:
            trainer.save()
        except Exception as error:
            if len(trainers) == 1:
                raise
            text = f"No checkpoint could be written at the stop: {run_errors.to_run_error(error, alone=False)}"
            trainer.run.emit(Message(level="warn", message=text, data={"kind": "checkpoint"}))


def _compute_gradients(slots: AdapterSlots, trainers: list[AdapterTrainer]) -> None:
    """Compute the gradients of the next step for every trainer. If memory runs out, repeat it in smaller passes.

    The dry run before step 1 has fitted, but memory may be fragmented by now, or another process may use the device. So
    passes are halved until each has one row.
    """
    retry_until_it_fits(
        lambda: _forward_and_backward(slots, trainers),
        # `any` would stop at the first that could be halved, but every trainer has to repeat its step.
        lambda: max([trainer.repeat_smaller() for trainer in trainers]),
        world=trainers[0].world,
        device=trainers[0].parameters[0].device,
    )


def _forward_and_backward(slots: AdapterSlots, trainers: list[AdapterTrainer]) -> None:
    """Compute the gradients of the next step for every trainer, micro-batch by micro-batch."""
    pieces = [trainer.draw() for trainer in trainers]
    for number, row in _passes(pieces, trainers):
        spans = _spans([sum(len(s.ids) for s in samples) for samples in row])
        objective = trainers[0].run.objective
        counts = [sum(map(objective.count, samples)) for samples in row]
        slots.put([trainer.run.layers for trainer in trainers], spans)
        for trainer in trainers:
            trainer.drop_by(number)
        batch = trainers[0].run.base.make_batch([sample for samples in row for sample in samples])
        parts = forward_backward(slots.model, objective, batch, counts, [trainer.wanted for trainer in trainers])
        for trainer, part in zip(trainers, parts, strict=True):
            trainer.add(number, part)
    for trainer in trainers:
        trainer.drop_by(None)
        for _ in range(trainer.idle_passes):
            _run_idle_pass(slots, trainer)


def _passes(
    pieces: list[list[list[Sample]]], trainers: list[AdapterTrainer]
) -> Iterator[tuple[int, list[list[Sample]]]]:
    """(number of the micro-batch, rows of each trainer) for each pass. Rows of different regimes never share one."""
    for number, row in enumerate(itertools.zip_longest(*pieces, fillvalue=[])):
        kinds = [c.run.regime(len(rows[0].ids)) if rows else None for c, rows in zip(trainers, row, strict=True)]
        several = dict.fromkeys(kind for kind, rows in zip(kinds, row, strict=True) if rows)
        for wanted in several:
            yield number, [rows if kind == wanted else [] for kind, rows in zip(kinds, row, strict=True)]


def _run_idle_pass(slots: AdapterSlots, trainer: AdapterTrainer) -> None:
    """Make a pass whose result is thrown away, because the other processes need this one's part of the base.

    The gradients of the step are put aside meanwhile. The shortest row is used, since it takes the least time.
    """
    row, objective = _shortest(trainer.run.data.samples), trainer.run.objective
    batch = trainer.run.base.make_batch([row])
    slots.put([trainer.run.layers], _spans([batch.ids.numel()]))
    gradients = [p.grad for p in trainer.parameters]
    trainer.optimizer.zero_grad()
    forward_backward(slots.model, objective, batch, [objective.count(row)])
    for parameter, gradient in zip(trainer.parameters, gradients, strict=True):
        parameter.grad = gradient


def _shortest(samples: Sequence[Sample]) -> Sample:
    return min(samples, key=lambda sample: len(sample.ids))


def _spans(lengths: Sequence[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise([0, *itertools.accumulate(lengths)]))


@torch.no_grad()
def evaluate(slots: AdapterSlots, trainer: AdapterTrainer, samples: Sequence[Sample]) -> dict[str, float]:
    """Loss and accuracy over all these rows.

    Each number has two names, `valid_*` and `full_valid_*`, because the hosted service has both. A loss that is not
    finite is left out. If memory runs out, all rows are evaluated again in smaller passes.
    """
    trainer.run.emit(Stage(stage="evaluating", message=f"Evaluating {len(samples)} validation rows"))
    world, device = trainer.world, trainer.parameters[0].device
    found = retry_until_it_fits(
        lambda: _sum_validation(slots, trainer, samples), trainer.evaluate_smaller, world=world, device=device
    )
    # All numbers in one tensor, because each copy to the host waits for the GPU. float64 holds all of them exactly.
    count = torch.full_like(found.loss, found.count, dtype=torch.float64)
    sums = torch.stack([found.loss.double(), *(value.double() for value in found.metrics.values()), count])
    world.all_reduce([sums])
    loss, *values, every = sums.tolist()
    means = {name: value / every for name, value in zip(found.metrics, values, strict=True)}
    if math.isfinite(loss):
        means["loss"] = loss / every
    return {f"{prefix}_{name}": value for name, value in means.items() for prefix in ("valid", "full_valid")}


def _sum_validation(slots: AdapterSlots, trainer: AdapterTrainer, samples: Sequence[Sample]) -> Sums:
    """The sums over this process's share of the rows."""
    world, objective = trainer.world, trainer.run.objective
    total = zero_sums(objective, trainer.parameters[0].device)
    every = split_into_batches(samples, trainer.run.evaluation_budget, trainer.run.regime)
    pieces = every[world.share]
    for done, piece in enumerate(pieces, start=1):
        batch = trainer.run.base.make_batch(piece)
        slots.put([trainer.run.layers], _spans([batch.ids.numel()]))
        (part,) = objective.sums(slots.model, batch, [sum(map(objective.count, piece))])
        total = add_sums(total, part)
        trainer.run.emit(Tick(done=done, total=len(pieces)))
    for _ in range(world.count_idle_passes(len(every))):  # as in `_run_idle_pass`
        row = _shortest(samples)
        objective.sums(slots.model, trainer.run.base.make_batch([row]), [objective.count(row)])
    return total
