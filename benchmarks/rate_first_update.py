"""Measures an initialized adapter before its first step: the optimizer's first update, and how the loss bends along it.

`benchmarks/rate_prediction.py` tries to predict a learning rate from these numbers. Parameters and gradients are as
before afterwards.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.rate_curvature import NATS, Extremes, Surroundings, curvature_along, extreme_eigenvalues, flatten
from lorainit.config.errors import InitFailed
from lorainit.context import Run
from lorainit.data.batches import split_into_batches
from lorainit.data.dataset import Sample
from lorainit.init.norms import norm
from lorainit.init.report import product_norm
from lorainit.model.forward.loss import forward_backward
from lorainit.model.layers.group import AdapterSlots
from lorainit.model.layers.layer import LoRALinear
from lorainit.model.layers.weight import weight_of
from lorainit.train.adapter_trainer import clip
from lorainit.train.optimizers import make_optimizer

PRODUCTS, SEED = 5, 0  # of the search for eigenvalues


@dataclass(frozen=True)
class FirstUpdate:
    """What the first update does to the loss and to the weights. An update is `rate` times a direction u.

    `direction`: u. `slope`: g·u with g the gradient, so that the loss falls by rate·slope to first order.
    `curvature`: uᵀ·H·u.
    `size`: ‖s·(u_B·A + B·u_A)‖ over ‖W‖, the relative change of the weights per unit of rate to first order, over all
    layers; `sizes`: of each layer. `eigenvalues`: of H. `gradients`: how many gradients it took in all.
    """

    direction: Tensor
    loss: float
    gradient_norm: float
    slope: float
    curvature: float
    size: float
    sizes: dict[str, float]
    eigenvalues: Extremes
    gradients: int

    @property
    def best_rate(self) -> float | None:
        """The rate at which one update lowers the loss most, to second order; None if the loss does not bend up."""
        return self.slope / self.curvature if self.curvature > 0 else None


@contextmanager
def surroundings(run: Run, rows: Sequence[Sample]) -> Iterator[Surroundings]:
    """The loss of an initialized run on these rows, around its start. The adapter is attached to the model inside."""
    slots = AdapterSlots(run.model)
    try:
        evaluate = partial(_mean_loss, run, slots, rows)
        yield Surroundings(run.parameters, lambda learns: evaluate(learns=learns), nats=NATS[run.base.dtype])
    finally:
        slots.clear()


def measure_first_update(run: Run, around: Surroundings) -> FirstUpdate:
    """Measure an initialized run in its `surroundings`.

    Raises:
        InitFailed: the gradient is zero.
    """
    loss, gradient = around.look()
    if not gradient.any():
        raise InitFailed("The adapter's gradient is zero on these rows, so nothing can be measured.", param="lora.init")
    u = first_direction(run, around, gradient)
    found = extreme_eigenvalues(around, gradient, products=PRODUCTS, seed=SEED)
    changes, weights = _changes(run.layers, around.split(u))
    return FirstUpdate(
        direction=u,
        loss=loss,
        gradient_norm=float(gradient.norm()),
        slope=float(gradient.double() @ u.double()),
        curvature=curvature_along(around, gradient, u),
        size=math.hypot(*changes.values()) / math.hypot(*weights.values()),
        sizes={name: change / weights[name] for name, change in changes.items()},
        eigenvalues=found,
        gradients=3 + found.gradients,
    )


def first_direction(run: Run, around: Surroundings, gradient: Tensor) -> Tensor:
    """The first update per unit of rate, from the run's own optimizer; the parameters are lowered by rate times it."""
    assert run.training.learning_rate is not None
    rate, before = run.training.learning_rate, flatten(run.parameters)
    optimizer = make_optimizer(run.training, run.layers)
    try:
        for parameter, part in zip(run.parameters, around.split(gradient), strict=True):
            parameter.grad = part.clone()
        clip(run)
        optimizer.step()
        return (before - flatten(run.parameters)) / rate
    finally:
        around.restore()


def _mean_loss(run: Run, slots: AdapterSlots, rows: Sequence[Sample], *, learns: bool) -> float:
    """The mean loss over the trained tokens of these rows, in passes as in training. `learns`: with its gradients."""
    objective, total = run.objective, 0.0
    tokens = sum(map(objective.count, rows))
    for piece in split_into_batches(rows, run.training_budget, run.regime):
        batch, counts = run.base.make_batch(piece), [sum(map(objective.count, piece))]
        slots.put([run.layers], [(0, batch.ids.numel())])
        if learns:
            (part,) = forward_backward(slots.model, objective, batch, counts, [tokens])
        else:
            with torch.no_grad():
                (part,) = objective.sums(slots.model, batch, counts)
        total += float(part.loss)
    return total / tokens


def _changes(layers: dict[str, LoRALinear], parts: Sequence[Tensor]) -> tuple[dict[str, float], dict[str, float]]:
    """‖s·(u_B·A + B·u_A)‖ and ‖W‖ of each layer. DoRA's magnitudes are left out."""
    changes, weights, left = dict[str, float](), dict[str, float](), iter(parts)
    for name, layer in layers.items():
        u = {kind: next(left) for kind in layer.trained_parameters()}
        down, up = torch.cat([layer.A.detach(), u["A"]]), torch.cat([u["B"], layer.B.detach()], dim=1)
        changes[name] = layer.scale * product_norm(down, up)
        weights[name] = norm(weight_of(layer.base).float())
    return changes, weights
