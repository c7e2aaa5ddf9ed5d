"""The preheated adapter of HRP: a LoRA of a higher rank that is trained for a few steps and then detached.

What is trained, for how long and with which optimizer are our choices, because we had no access to the paper's body
(see `lorainit.init.methods.hrp`). The main run has an optimizer of its own, and by default it trains on all rows from
the start.
"""

import math
import time
from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import torch
from torch import nn

from lorainit.config.errors import NonFiniteLoss, UnsupportedInit
from lorainit.config.events import Message, Tick
from lorainit.config.inits.data import HRP
from lorainit.context import Run
from lorainit.data.batches import collate, split_into_batches
from lorainit.data.dataset import Sample
from lorainit.init.collectors import memory
from lorainit.init.evidence import Evidence
from lorainit.init.linalg import normal
from lorainit.init.methods.hrp import alive_directions
from lorainit.model.forward.loss import forward_backward
from lorainit.model.layers.experts import ExpertLinear
from lorainit.model.layers.factors import Factors
from lorainit.model.layers.layer import LoRALinear, attach_temporarily
from lorainit.model.layers.weight import device_of, shape_of
from lorainit.runtime.devices import make_generator

MAX_RANK, RANK_FACTOR = 128, 8  # our choice, as are the steps: the part of the paper that we could read names none
MIN_STEPS, MAX_STEPS, SHARE_OF_STEPS = 20, 200, 0.02
SAY_STEPS, SAY_SECONDS = 10, 1.0


def preheat(config: HRP, run: Run) -> dict[str, Evidence]:
    """Train a rank-R adapter on every target from B' = 0 and return its factors.

    The optimizer is AdamW at the run's learning rate or `preheat_learning_rate`, constant, without weight decay,
    dropout or warm-up. The batches, their order, the clipping and the scale s are those of the run. The model is
    unchanged afterwards.

    Raises:
        UnsupportedInit: R does not fit a target; the message names it.
        NonFiniteLoss: the loss or the gradient norm is NaN or infinite.
        OutOfMemory: the preheated adapter and its optimizer take more memory than is free.
    """
    ranks = {name: preheat_rank(config, name, module, r=run.lora.r) for name, module in run.targets.items()}
    steps = preheat_steps(config, total=run.plan.total_steps)
    _warn_without_gain(ranks, run)
    sides = {name: sum(shape_of(module)) for name, module in run.targets.items()}
    # Four numbers for each parameter: itself, its gradient and the optimizer's two moments.
    numbers = 4 * sum(ranks[name] * side for name, side in sides.items())
    memory.require_memory(run, "hrp's preheated adapter with its optimizer", numbers=numbers, device=run.device)
    seed = config.seed_for(run.spec.seed)
    layers = {
        name: _adapter(module, ranks[name], config, scale=run.lora.scaling, generator=make_generator(seed, name))
        for name, module in run.targets.items()
    }
    with attach_temporarily(run.model, layers):
        losses = _train(layers, steps, config, run)
    facts = {
        "mode": config.preheat_mode,
        "max_rank": max(ranks.values()),
        "steps": steps,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        # The preheat's steps come in addition to those of the run, which begins with a new optimizer.
        "main_optimizer": "fresh",
        "main_data": "from the start" if config.main_data == "rewind" else "after the preheat's",
    }
    return {
        name: _evidence(layer, config, r=run.lora.r, facts={"preheat_rank": ranks[name], "preheat": facts})
        for name, layer in layers.items()
    }


def _evidence(layer: LoRALinear, config: HRP, *, r: int, facts: dict[str, Any]) -> Evidence:
    """The preheated factors. An expert that has not learned r directions, for lack of tokens, is `starved`."""
    A, B = layer.A.detach().cpu(), layer.B.detach().cpu()
    may_starve = isinstance(layer.base, ExpertLinear) and config.complete is None
    if may_starve and alive_directions(A, B, config) < r:
        return Evidence(starved=True, facts=facts)
    return Evidence(preheated=(A, B), facts=facts)


def preheat_rank(config: HRP, name: str, module: nn.Module, *, r: int) -> int:
    """R of one layer; "auto" = min(128, 8r, smaller side)."""
    side = min(shape_of(module))
    if config.preheat_rank == "auto":
        return max(r, min(MAX_RANK, RANK_FACTOR * r, side))
    if not r <= config.preheat_rank <= side:
        raise UnsupportedInit(
            f"{name}: preheat_rank {config.preheat_rank} must lie between r = {r} and the smaller side, {side}.",
            param="lora.init.preheat_rank",
        )
    return config.preheat_rank


def preheat_steps(config: HRP, *, total: int) -> int:
    """Preheat steps; "auto" = 2 % of the run's own, at least 20 and at most 200, never more than the run has."""
    if config.preheat_steps != "auto":
        return config.preheat_steps
    return min(total, max(MIN_STEPS, min(MAX_STEPS, round(SHARE_OF_STEPS * total))))


def _warn_without_gain(ranks: dict[str, int], run: Run) -> None:
    same = [name for name, R in ranks.items() if run.lora.r == R]
    if same:
        text = f"{len(same)} modules are preheated at the run's own rank, {same[0]} among them: no gain over random A."
        run.emit(Message(level="warn", message=text, data={"kind": "init"}))


def _adapter(module: nn.Module, R: int, config: HRP, *, scale: float, generator: torch.Generator) -> LoRALinear:
    """A new adapter: random A' (`preheat_a_law`) and B' = 0, float32 on the module's device."""
    (out, n), device = shape_of(module), device_of(module)
    if config.preheat_a_law == "orthonormal":
        A = torch.linalg.qr(normal(n, R, generator=generator)).Q.T
    else:
        A = (2 * torch.rand(R, n, generator=generator) - 1) / math.sqrt(n)
    factors = Factors(A=A.contiguous().to(device), B=torch.zeros(out, R, device=device))
    layer = LoRALinear(module, factors, scale=scale, subtract=False)
    layer.A.requires_grad_(config.preheat_mode == "classic")
    return layer


def _train(layers: dict[str, LoRALinear], steps: int, config: HRP, run: Run) -> list[float]:
    """Train for `steps` steps. Returns the loss before each of them."""
    recipe = run.training
    rate = recipe.learning_rate if config.preheat_learning_rate == "auto" else config.preheat_learning_rate
    assert rate is not None
    parameters = [p for layer in layers.values() for p in (layer.A, layer.B) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    said, losses = time.monotonic(), list[float]()
    for step, samples in enumerate(islice(_stream(run), steps), start=1):
        loss = _accumulate(samples, step, steps, run)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm or math.inf))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteLoss(
                f"Preheat step {step}: loss {loss}, gradient norm {norm}. A lower learning rate usually helps.",
                param="lora.init.preheat_learning_rate",
            )
        losses.append(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step in (1, steps) or step % SAY_STEPS == 0 or time.monotonic() - said > SAY_SECONDS:
            said = time.monotonic()
            text = f"Preheating at rank {max(layer.A.shape[0] for layer in layers.values())}: step {step}/{steps}"
            data = {"kind": "init", "step": step, "steps": steps, "loss": loss}
            run.emit(Message(message=f"{text}, loss {loss:.4f}", data=data))
    return losses


def _stream(run: Run) -> Iterator[list[Sample]]:
    """The run's effective batches from its first step on, epoch after epoch."""
    size = run.training.batch_size
    assert size != "auto"
    for epoch in count():
        shuffled = run.order_rows(epoch)
        for start in range(0, len(shuffled), size):
            yield [run.data.samples[i] for i in shuffled[start : start + size]]


def _accumulate(samples: list[Sample], step: int, steps: int, run: Run) -> float:
    """Compute the gradients of one effective batch, in micro-batches as in training. Returns its loss."""
    pieces = split_into_batches(samples, run.evidence_budget, run.regime)
    count = run.objective.count
    wanted = sum(map(count, samples))
    loss = 0.0
    for done, piece in enumerate(pieces, start=1):
        batch = collate(piece, pad=run.base.pad).to(run.device)
        (part,) = forward_backward(run.model, run.objective, batch, [sum(map(count, piece))], [wanted])
        loss += float(part.loss) / wanted
        run.emit(Tick(done=(step - 1) * len(pieces) + done, total=steps * len(pieces)))
    return loss
