"""The training loop, top to bottom: one base, one forward pass, one adapter or several.

Plain on purpose. Each adapter's rows, optimizer and log are its own (`lorainit.train.adapter_trainer`); what they
share is the base and the clock.
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
from lorainit.data.batches import batches
from lorainit.data.dataset import Sample
from lorainit.model.forward.loss import Sums, add_sums, forward_backward, zero_sums
from lorainit.model.layers.group import AdapterSlots
from lorainit.runtime.distributed import run_errors
from lorainit.runtime.retry import retry_until_it_fits
from lorainit.train.adapter_trainer import AdapterTrainer, Evaluate
from lorainit.train.checkpoint import Progress, Restored

End = Progress | LorainitError


def train(
    runs: Sequence[Run], resumed: Sequence[Restored | None], *, write_adapter: Callable[[Run, Path], None]
) -> Generator[list[tuple[int, End]], None, None]:
    """Train the adapters of `runs` in place, on the base that they share and that carries none of them.

    Yields the runs that have just ended, each as its index and how far it came or the error it ended by: whatever
    goes wrong in its own work, as an evaluation or a checkpoint, ends that run. At a yield the model is bare and the
    caller's. What `emit` raises beside our own errors ends everything; a `Stopped`, also one that the caller throws
    in, does so too, once each run's steps so far are in a checkpoint.

    Args:
        resumed: the checkpoint that each of them goes on from, if it does.
        write_adapter: as for `AdapterTrainer`.
    """
    slots = AdapterSlots(runs[0].model)
    trainers, ended = dict[int, AdapterTrainer](), list[tuple[int, End]]()

    def begin(who: int) -> None:
        try:
            trainers[who] = AdapterTrainer(runs[who], write_adapter=write_adapter, resumed=resumed[who])
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
        for who in range(len(runs)):  # no variable holds on to the optimizer of one that has ended
            begin(who)
        while trainers or ended:
            slots.clear()
            if ended:
                yield ended
            ended = []
            while trainers and not ended:
                _compute_gradients(slots, list(trainers.values()))
                poisoned = [who for who, trainer in trainers.items() if len(trainers) > 1 and trainer.is_poisoned()]
                for who in poisoned:  # in bf16 its own rows are not the only ones that this has spoiled
                    attempt(who, trainers[who].give_up)
                for who in list(trainers):
                    again = partial(_compute_gradients, slots, [trainers[who]])
                    finish = partial(trainers[who].finish_step, pass_again=again)
                    attempt(who, trainers[who].repeat_step if poisoned else finish)
                    del again, finish
    except Stopped:
        _save_all(list(trainers.values()))
        raise
    finally:
        slots.clear()


def _save_all(trainers: Sequence[AdapterTrainer]) -> None:
    """A checkpoint of each; one of several whose cannot be written keeps no other from its own, and says so."""
    for trainer in trainers:
        try:
            trainer.save()
        except Exception as error:
            if len(trainers) == 1:
                raise
            text = f"No checkpoint of this moment could be written: {run_errors.to_run_error(error, alone=False)}"
            trainer.run.emit(Message(level="warn", message=text, data={"kind": "checkpoint"}))


def _compute_gradients(slots: AdapterSlots, trainers: list[AdapterTrainer]) -> None:
    """Everybody's next step as far as the gradients; where memory runs out in it, it is drawn again in smaller passes.

    Memory is in pieces by then, or others use the device: passes are halved, until rows go alone.
    """
    retry_until_it_fits(
        lambda: _forward_and_backward(slots, trainers),
        lambda: max([trainer.repeat_smaller() for trainer in trainers]),
        world=trainers[0].world,
        device=trainers[0].parameters[0].device,
    )


def _forward_and_backward(slots: AdapterSlots, trainers: list[AdapterTrainer]) -> None:
    """Everybody's next step as far as the gradients, micro-batch by micro-batch."""
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
        for _ in range(trainer.count_idle_passes):
            _run_idle_pass(slots, trainer)


def _passes(
    pieces: list[list[list[Sample]]], trainers: list[AdapterTrainer]
) -> Iterator[tuple[int, list[list[Sample]]]]:
    """(number of the micro-batch, everybody's rows) of each pass; rows of different regimes never share one."""
    for number, row in enumerate(itertools.zip_longest(*pieces, fillvalue=[])):
        kinds = [c.run.regime(len(rows[0].ids)) if rows else None for c, rows in zip(trainers, row, strict=True)]
        several = dict.fromkeys(kind for kind, rows in zip(kinds, row, strict=True) if rows)
        for wanted in several:
            yield number, [rows if kind == wanted else [] for kind, rows in zip(kinds, row, strict=True)]


def _run_idle_pass(slots: AdapterSlots, trainer: AdapterTrainer) -> None:
    """A pass for the sake of the others, who need this process's part of the base: the gradients stay as they are."""
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
    """Loss and accuracy over all these rows, under both names the hosted service uses.

    Where memory runs out all of them are looked at again, in smaller passes.
    """
    trainer.run.emit(Stage(stage="evaluating", message=f"Evaluating {len(samples)} validation rows"))
    world, device = trainer.world, trainer.parameters[0].device
    found = retry_until_it_fits(
        lambda: _sum_validation(slots, trainer, samples), trainer.evaluate_smaller, world=world, device=device
    )
    # Together, since a GPU is waited for each time; float64 has all of them exactly.
    count = torch.full_like(found.loss, found.count, dtype=torch.float64)
    sums = torch.stack([found.loss.double(), *(value.double() for value in found.metrics.values()), count])
    world.all_reduce([sums])
    loss, *values, every = sums.tolist()
    means = {name: value / every for name, value in zip(found.metrics, values, strict=True)}
    if math.isfinite(loss):
        means["loss"] = loss / every
    return {f"{prefix}_{name}": value for name, value in means.items() for prefix in ("valid", "full_valid")}


def _sum_validation(slots: AdapterSlots, trainer: AdapterTrainer, samples: Sequence[Sample]) -> Sums:
    """The sums over this process's part of the rows."""
    world, objective = trainer.world, trainer.run.objective
    total = zero_sums(objective, trainer.parameters[0].device)
    every = batches(samples, trainer.run.evaluation_budget, trainer.run.regime)
    pieces = every[world.share]
    for done, piece in enumerate(pieces, start=1):
        batch = trainer.run.base.make_batch(piece)
        slots.put([trainer.run.layers], _spans([batch.ids.numel()]))
        (part,) = objective.sums(slots.model, batch, [sum(map(objective.count, piece))])
        total = add_sums(total, part)
        trainer.run.emit(Tick(done=done, total=len(pieces)))
    for _ in range(world.count_idle_passes(len(every))):
        row = _shortest(samples)
        objective.sums(slots.model, trainer.run.base.make_batch([row]), [objective.count(row)])
    return total
