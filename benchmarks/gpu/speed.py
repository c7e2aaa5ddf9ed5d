"""Training steps at the shapes of real models: ours, and beside them HF Trainer's with PEFT."""

from collections.abc import Callable
from importlib.util import find_spec
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.day import SHAPES, Day, adapters, rows
from benchmarks.gpu.meter import Meter
from benchmarks.gpu.rivals import hf_trainer
from benchmarks.gpu.steps import GROUPS, RANK, STEPS, Case, Contender, table
from lorainit.config.spec import Hyperparameters
from lorainit.data.batches import pack
from lorainit.model.forward import attention
from lorainit.model.forward.loss import sum_losses_by_adapter
from lorainit.model.forward.recompute import recompute
from lorainit.model.layers.group import AdapterSlots
from lorainit.train.optimizers import make_optimizer


def steps(day: Day) -> None:
    """One adapter: ours, ours as a job runs it by default, which has to repeat bit by bit, and HF Trainer's."""
    there = find_spec("accelerate") is not None
    table(day, [Case("tiny", 4, 64)] if day.tiny else STEPS, [OURS, DETERMINISTIC, *[HF_TRAINER] * there])
    if not there:
        day.say("\nHF Trainer was not measured: accelerate, which it needs, is not installed.")


def groups(day: Day) -> None:
    """Eight adapters in one pass beside one of them alone with rows of its own."""
    cases = [Case("tiny", 1, 64, group=2)] if day.tiny else GROUPS
    table(day, [case for one in cases for case in (Case(one.shape, one.count, one.length), one)], [OURS])


def _ours(day: Day, case: Case, model: Any, meter: Meter) -> None:
    step = _step(day, case, model)
    for _ in range(meter.steps):
        with meter.step():
            step()


def _deterministic(day: Day, case: Case, model: Any, meter: Meter) -> None:
    debugging: Any = torch.utils.deterministic
    debugging.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        _ours(day, case, model, meter)
    finally:
        torch.use_deterministic_algorithms(False)


def _step(day: Day, case: Case, model: Any) -> Callable[[], None]:
    model.set_attn_implementation(attention.NAME)
    members = [adapters(model, rank=RANK, device=day.device) for _ in range(case.group)]
    optimizers = [make_optimizer(Hyperparameters(learning_rate=1e-4), layers) for layers in members]
    trained = [[p for layer in layers.values() for p in layer.trained_parameters().values()] for layers in members]
    if case.again:
        recompute(model)
    samples = [rows(case.count, case.length, SHAPES[case.shape]["vocab_size"]) for _ in members]
    counts = [sum(int(s.trained[1:].sum()) for s in some) for some in samples]
    spans = list(pairwise(accumulate([case.count * case.length] * case.group, initial=0)))
    slots = AdapterSlots(model)

    def step() -> None:
        slots.put(members, spans)
        batch = pack([sample for some in samples for sample in some]).to(day.device)
        parts = sum_losses_by_adapter(model, batch, counts)
        torch.autograd.backward(torch.stack([p.loss / n for p, n in zip(parts, counts, strict=True)]).sum())
        for part, some, optimizer in zip(parts, trained, optimizers, strict=True):
            norm = nn.utils.clip_grad_norm_(some, 1.0)
            torch.stack([part.loss.detach(), norm]).tolist()  # as a run reads them
            optimizer.step()
            optimizer.zero_grad()
        slots.clear()

    return step


OURS = Contender("ours", _ours)
DETERMINISTIC = Contender("ours, deterministic", _deterministic)
HF_TRAINER = Contender("HF Trainer + PEFT", hf_trainer, changes=True)
