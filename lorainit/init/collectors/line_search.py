"""Finds the step size of a displaced start by trying a few on calibration rows (our extension of LoRA-One).

LoRA-One's published gamma = 128 does not fit every model: the start changes every layer's weight by operator norm
s/gamma, and how large a change a model tolerates differs by orders of magnitude. All layers have the same gamma, as in
the paper. If possible the search uses rows after those that the gradient came from, because on its own rows a step
looks better than it is. (SmolLM2, 8 rows of 64 tokens: gamma 128 took the loss on these rows from 4.96 to 4.22, and on
other text from 4.02 to 4.11. Four unseen rows chose 256, with which other text went to 3.94.)
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from lorainit.config.errors import InitFailed
from lorainit.config.events import Message, Tick
from lorainit.config.inits.data import LoRAOne
from lorainit.context import Run
from lorainit.data.batches import Budget, Regime, any_length, collate, split_into_batches
from lorainit.data.dataset import Sample
from lorainit.init.collectors.gradients import collect_gradients, split_rows
from lorainit.init.evidence import Evidence, StepSearch
from lorainit.init.methods.lora_one import lora_one
from lorainit.model.forward.loss import row_losses
from lorainit.model.layers.layer import LoRALinear, adapted_layers, attach
from lorainit.model.layers.weight import weight_of
from lorainit.runtime.devices import make_generator

# Smallest step first. These are powers of four; then the best one's neighbours at a factor of two are tried.
GAMMAS = tuple(4.0**k for k in range(8, 1, -1))


def collect_for_lora_one(config: LoRAOne, run: Run) -> dict[str, Evidence]:
    """The gradient of each target and, with gamma "auto", the step that suits this model.

    Raises:
        As `collect_gradients` and `search_step`.
    """
    evidence = collect_gradients(config, run)
    if config.gamma != "auto":
        return evidence
    rows, unseen = split_rows(config, run)
    return search_step(config, run, unseen or rows, evidence, held_out=bool(unseen))


def search_step(
    config: LoRAOne,
    run: Run,
    rows: Sequence[Sample],
    evidence: Mapping[str, Evidence],
    *,
    held_out: bool,
) -> dict[str, Evidence]:
    """The same evidence with the gamma of least loss on `rows`.

    Args:
        held_out: the gradient was not computed from these rows.

    Raises:
        InitFailed: no step lowers the loss. A start that is worse than the base model is never chosen.
    """
    tried: dict[float, float] = {}

    def loss_at(gamma: float) -> float:
        scale = run.lora.scaling / gamma
        for layer in adapted_layers(run.model).values():
            layer.scale = scale
        loss = compute_calibration_loss(
            run.model, rows, pad=run.base.pad, device=run.device, budget=budget, regime=regime
        )
        run.emit(Tick(done=len(tried) + 1, total=len(GAMMAS) + 2))
        return loss if math.isfinite(loss) else math.inf

    budget, regime = run.evidence_budget, run.regime
    base = compute_calibration_loss(run.model, rows, pad=run.base.pad, device=run.device, budget=budget, regime=regime)
    with _attached(config, run, evidence):
        for gamma in GAMMAS:
            tried[gamma] = loss_at(gamma)
        best = min(tried, key=tried.__getitem__)
        for gamma in (best * 2, best / 2):
            tried[gamma] = loss_at(gamma)
    best = min(tried, key=tried.__getitem__)
    if not tried[best] < base:  # not `>=`, so that a base loss of NaN is refused too
        raise _no_step(base, tried)
    step = StepSearch(gamma=best, base_loss=base, tried=tuple(sorted(tried.items(), reverse=True)), held_out=held_out)
    run.emit(_found(step))
    facts = {"gamma": step.gamma, "line_search": step.facts()}
    return {name: replace(found, step=step, facts={**found.facts, **facts}) for name, found in evidence.items()}


@torch.no_grad()
def compute_calibration_loss(
    model: nn.Module,
    rows: Sequence[Sample],
    *,
    pad: int,
    device: torch.device,
    budget: Budget,
    regime: Regime = any_length,
) -> float:
    """Mean over rows of each row's mean loss: the same loss that the gradient was computed of."""
    pieces = (collate(piece, pad=pad).to(device) for piece in split_into_batches(rows, budget, regime))
    return sum(float(row_losses(model, batch).sum()) for batch in pieces) / len(rows)


@contextmanager
def _attached(config: LoRAOne, run: Run, evidence: Mapping[str, Evidence]) -> Iterator[None]:
    """Attach the start at gamma = 1 to every layer while the context lasts.

    The caller tries a gamma by setting `scale`, so that the SVD of each gradient is computed only once.
    """
    unit = config.model_copy(update={"gamma": 1.0})
    seed = config.seed_for(run.spec.seed)
    r = run.lora.r
    try:
        for name, module in run.targets.items():
            if evidence[name].starved:  # it starts as kaiming does, so it adds nothing to the loss
                continue
            W, generator = weight_of(module).detach(), make_generator(seed, name)
            factors = lora_one(W, evidence[name], rank=r, scale=1.0, config=unit, generator=generator)
            attach(run.model, name, LoRALinear(module, factors, scale=1.0, subtract=False))
        yield
    finally:
        for name, module in run.targets.items():
            attach(run.model, name, module)


def _found(step: StepSearch) -> Message:
    loss = dict(step.tried)[step.gamma]
    rows = "rows that the gradient has not seen" if step.held_out else "the gradient's own rows (there are no others)"
    text = f"Line search: gamma = {step.gamma:g} takes the loss on {rows} from {step.base_loss:.4f}"
    return Message(message=f"{text} to {loss:.4f}", data={"kind": "init", "gamma": step.gamma, **step.facts()})


def _no_step(base: float, tried: Mapping[float, float]) -> InitFailed:
    shown = ", ".join(f"{g:g}: {x:.4f}" for g, x in sorted(tried.items(), reverse=True))
    return InitFailed(
        f"lora_one: no step along the gradient lowers the loss on the calibration rows ({base:.4f}; gamma: loss ="
        f" {shown}). More calibration rows, precision fp32 or version v1, which starts where the base model is, help.",
        param="lora.init.gamma",
    )
