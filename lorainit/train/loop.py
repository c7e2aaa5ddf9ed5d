"""The training loop, top to bottom: one base, one forward pass, one adapter or several.

Plain on purpose. Each adapter's rows, optimizer and log are its own (`lorainit.train.adapter_trainer`); what they
share is the base and the clock.
"""

import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial

import torch
from torch import nn

from lorainit.config.errors import LorainitError, Stopped
from lorainit.config.events import Message, Stage, Tick
from lorainit.data.batches import Batch, batches
from lorainit.data.dataset import Sample
from lorainit.model.forward.loss import Sums, add_sums, forward_backward, zero_sums
from lorainit.model.layers.group import AdapterSlots
from lorainit.runtime.distributed import run_errors
from lorainit.runtime.distributed.world import World
from lorainit.runtime.retry import retry_until_it_fits
from lorainit.train.adapter_trainer import Course, Evaluate
from lorainit.train.checkpoint import Progress
from lorainit.train.member import Member

MakeBatch = Callable[[Sequence[Sample]], Batch]
End = Progress | LorainitError


def train(
    model: nn.Module, members: Sequence[Member], *, make_batch: MakeBatch, world: World
) -> Generator[list[tuple[int, End]], None, None]:
    """Train the adapters of `members` in place, on a `model` that carries none of them.

    Yields the members that have just ended, each as its index and how far it came or the error it ended by: whatever
    goes wrong in its own work, as an evaluation or a checkpoint, ends that member. At a yield the model is bare and the
    caller's. What `on_event` raises beside our own errors ends everything; a `Stopped`, also one that the caller throws
    in, does so too, once each member's steps so far are in a checkpoint.

    Args:
        lay: rows to a batch on the model's device; with several members it must pack.
    """
    slots = AdapterSlots(model)
    courses, ended = dict[int, Course](), list[tuple[int, End]]()

    def begin(who: int) -> None:
        try:
            courses[who] = Course(members[who], world)
        except Exception as error:
            ended.append((who, run_errors.to_run_error(error, alone=len(members) == 1)))
        else:
            attempt(who, courses[who].begin)

    def attempt(who: int, work: Callable[[Evaluate], None]) -> None:
        course = courses[who]
        try:
            work(lambda samples: evaluate(slots, course, samples, make_batch=make_batch))
            if course.is_over:
                ended.append((who, course.progress))
        except Exception as error:
            ended.append((who, run_errors.to_run_error(error, alone=len(members) == 1)))
        if ended and ended[-1][0] == who:
            del courses[who]

    try:
        for who in range(len(members)):  # no variable holds on to the optimizer of one that has ended
            begin(who)
        while courses or ended:
            slots.clear()
            if ended:
                yield ended
            ended = []
            while courses and not ended:
                _compute_gradients(slots, list(courses.values()), make_batch)
                poisoned = [who for who, course in courses.items() if len(courses) > 1 and course.is_poisoned()]
                for who in poisoned:  # in bf16 its own rows are not the only ones that this has spoiled
                    attempt(who, courses[who].give_up)
                for who in list(courses):
                    again = partial(_compute_gradients, slots, [courses[who]], make_batch)
                    finish = partial(courses[who].finish_step, pass_again=again)
                    attempt(who, courses[who].repeat_step if poisoned else finish)
                    del again, finish
    except Stopped:
        _save_all(list(courses.values()))
        raise
    finally:
        slots.clear()


def _save_all(courses: Sequence[Course]) -> None:
    """A checkpoint of each; one of several whose cannot be written keeps no other from its own, and says so."""
    for course in courses:
        try:
            course.save()
        except Exception as error:
            if len(courses) == 1:
                raise
            text = f"No checkpoint of this moment could be written: {run_errors.to_run_error(error, alone=False)}"
            course.member.on_event(Message(level="warn", message=text, data={"kind": "checkpoint"}))


def _compute_gradients(slots: AdapterSlots, courses: list[Course], make_batch: MakeBatch) -> None:
    """Everybody's next step as far as the gradients; where memory runs out in it, it is drawn again in smaller passes.

    Memory is in pieces by then, or others use the device: passes are halved, until rows go alone.
    """
    retry_until_it_fits(
        lambda: _forward_and_backward(slots, courses, make_batch),
        lambda: max([course.repeat_smaller() for course in courses]),
        world=courses[0].world,
        device=courses[0].parameters[0].device,
    )


def _forward_and_backward(slots: AdapterSlots, courses: list[Course], make_batch: MakeBatch) -> None:
    """Everybody's next step as far as the gradients, micro-batch by micro-batch."""
    pieces = [course.draw() for course in courses]
    for number, row in _passes(pieces, courses):
        spans = _spans([sum(len(s.ids) for s in samples) for samples in row])
        objective = courses[0].member.objective
        counts = [sum(map(objective.count, samples)) for samples in row]
        slots.put([course.member.layers for course in courses], spans)
        for course in courses:
            course.drop_by(number)
        batch = make_batch([sample for samples in row for sample in samples])
        parts = forward_backward(slots.model, objective, batch, counts, [course.wanted for course in courses])
        for course, part in zip(courses, parts, strict=True):
            course.add(number, part)
    for course in courses:
        course.drop_by(None)
        for _ in range(course.count_idle_passes):
            _run_idle_pass(slots, course, make_batch)


def _passes(pieces: list[list[list[Sample]]], courses: list[Course]) -> Iterator[tuple[int, list[list[Sample]]]]:
    """(number of the micro-batch, everybody's rows) of each pass; rows of different regimes never share one."""
    for number, row in enumerate(itertools.zip_longest(*pieces, fillvalue=[])):
        kinds = [c.member.regime(len(rows[0].ids)) if rows else None for c, rows in zip(courses, row, strict=True)]
        several = dict.fromkeys(kind for kind, rows in zip(kinds, row, strict=True) if rows)
        for wanted in several:
            yield number, [rows if kind == wanted else [] for kind, rows in zip(kinds, row, strict=True)]


def _run_idle_pass(slots: AdapterSlots, course: Course, make_batch: MakeBatch) -> None:
    """A pass for the sake of the others, who need this process's part of the base: the gradients stay as they are."""
    row, objective = _shortest(course.member.data.samples), course.member.objective
    batch = make_batch([row])
    slots.put([course.member.layers], _spans([batch.ids.numel()]))
    gradients = [p.grad for p in course.parameters]
    course.optimizer.zero_grad()
    forward_backward(slots.model, objective, batch, [objective.count(row)])
    for parameter, gradient in zip(course.parameters, gradients, strict=True):
        parameter.grad = gradient


def _shortest(samples: Sequence[Sample]) -> Sample:
    return min(samples, key=lambda sample: len(sample.ids))


def _spans(lengths: Sequence[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise([0, *itertools.accumulate(lengths)]))


@torch.no_grad()
def evaluate(
    slots: AdapterSlots, course: Course, samples: Sequence[Sample], *, make_batch: MakeBatch
) -> dict[str, float]:
    """Loss and accuracy over all these rows, under both names the hosted service uses.

    Where memory runs out all of them are looked at again, in smaller passes.
    """
    course.member.on_event(Stage(stage="evaluating", message=f"Evaluating {len(samples)} validation rows"))
    world, device = course.world, course.parameters[0].device
    found = retry_until_it_fits(
        lambda: _sum_validation(slots, course, samples, make_batch), course.evaluate_smaller, world=world, device=device
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


def _sum_validation(slots: AdapterSlots, course: Course, samples: Sequence[Sample], make_batch: MakeBatch) -> Sums:
    """The sums over this process's part of the rows."""
    world, objective = course.world, course.member.objective
    total = zero_sums(objective, course.parameters[0].device)
    every = batches(samples, course.member.evaluation_budget, course.member.regime)
    pieces = world.share(every)
    for done, piece in enumerate(pieces, start=1):
        batch = make_batch(piece)
        slots.put([course.member.layers], _spans([batch.ids.numel()]))
        (part,) = objective.sums(slots.model, batch, [sum(map(objective.count, piece))])
        total = add_sums(total, part)
        course.member.on_event(Tick(done=done, total=len(pieces)))
    for _ in range(world.count_idle_passes(every)):
        row = _shortest(samples)
        objective.sums(slots.model, make_batch([row]), [objective.count(row)])
    return total
