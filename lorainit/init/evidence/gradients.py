"""The mean full gradient of every target's weight over a few calibration rows.

The weighting is the one LoRA-GA and LoRA-One use with micro-batches of one row: the mean over rows of
each row's mean loss over its trained tokens, so short rows count as much as long ones. How many rows
share a forward pass changes nothing but speed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorainit.config.errors import InitFailed, UnsupportedInit
from lorainit.config.events import Tick
from lorainit.config.inits.data import LoRAGA, LoRAOne
from lorainit.context import Run
from lorainit.data.batches import Budget, Regime, any_length, batches, collate
from lorainit.data.dataset import Sample
from lorainit.init.evidence import Evidence, memory
from lorainit.init.evidence.rows import warn_few_rows
from lorainit.model.forward.loss import NEXT_TOKEN, Objective, backward
from lorainit.model.layers.experts import ExpertLinear
from lorainit.model.layers.weight import shape_of
from lorainit.model.targets.names import listed

OnTick = Callable[[int, int], None]


def gradient_evidence(config: LoRAGA | LoRAOne, run: Run) -> dict[str, Evidence]:
    """The gradient of each target, from the first rows.

    Experts of a mixture that get none are `starved`.

    Raises:
        UnsupportedInit: there is no row to look at, or a module gets no gradient from the rows.
        InitFailed: a gradient is not finite.
        OutOfMemory: the gradients take more than is free.
    """
    rows = calibration_rows(config, run)
    numbers = sum(out * n for out, n in map(shape_of, run.targets.values()))
    what = f"{config.method}'s gradient of every matrix"
    memory.require_memory(run, what, numbers=numbers, device=torch.device("cpu"))

    def tick(done: int, total: int) -> None:
        run.emit(Tick(done=done, total=total))

    found = mean_gradients(
        run.model,
        run.targets,
        rows,
        pad=run.base.pad,
        device=run.device,
        budget=run.evidence_budget,
        regime=run.regime,
        objective=run.objective,
        on_tick=tick,
    )
    # An expert that no row was routed to has no first step that could be better than another.
    starved = {n for n, G in found.items() if isinstance(run.targets[n], ExpertLinear) and not G.any()}
    refuse_unusable({name: G for name, G in found.items() if name not in starved})
    return {
        name: Evidence(starved=True, rows=len(rows)) if name in starved else Evidence(gradient=G, rows=len(rows))
        for name, G in found.items()
    }


def split_rows(config: LoRAGA | LoRAOne, run: Run) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """The first `samples` rows that have a trained token, and as many after them, if there are."""
    usable = [s for s in run.samples if s.trained[1:].any()]
    return usable[: config.samples], usable[config.samples : 2 * config.samples]


def calibration_rows(config: LoRAGA | LoRAOne, run: Run) -> Sequence[Sample]:
    """The first `samples` rows that have a trained token. Fewer than asked for is reported."""
    rows, _ = split_rows(config, run)
    if not rows:
        raise UnsupportedInit(
            f"{config.method} takes its start from the gradient, and no calibration row has a trained token.",
            param="lora.init",
        )
    if len(rows) < config.samples:
        run.emit(warn_few_rows(config, len(rows)))
    return rows


def mean_gradients(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    rows: Sequence[Sample],
    *,
    pad: int,
    device: torch.device,
    budget: Budget,
    regime: Regime = any_length,
    objective: Objective = NEXT_TOKEN,
    on_tick: OnTick,
) -> dict[str, Tensor]:
    """∂L/∂W of each target, out×in, float32 on the CPU; L = mean over rows of the row's mean loss.

    Args:
        model: its parameters are frozen before and after; its mode is left alone.
        budget: of a forward pass; `regime`: which rows may share one.
        on_tick: called with (rows done, rows) after every pass.
    """
    sums: dict[str, Tensor] = {}
    done = 0
    with _gradients_taken_away(model, targets, sums):
        for piece in batches(rows, budget, regime):
            backward([objective.row_losses(model, collate(piece, pad=pad).to(device)).sum()])
            done += len(piece)
            on_tick(done, len(rows))
    return {name: _mean(sums.get(name), module, len(rows)) for name, module in targets.items()}


def _mean(total: Tensor | None, module: nn.Module, rows: int) -> Tensor:
    if total is None:  # the rows never reached this module
        return torch.zeros(shape_of(module))
    return total.div_(rows)


@contextmanager
def _gradients_taken_away(
    model: nn.Module, targets: Mapping[str, nn.Module], sums: dict[str, Tensor]
) -> Iterator[None]:
    """Add each target's gradient to `sums` while it passes, so that one at most is on the device.

    The weights themselves stay frozen, whatever form they have: a weight's gradient is made of the
    layer's inputs and of the gradient of its outputs.
    """
    before = {p: p.requires_grad for p in model.parameters()}
    handles = []
    try:
        for parameter in before:
            parameter.requires_grad = False
        for name, module in targets.items():
            handles.append(module.register_forward_pre_hook(_begin_graph))
            handles.append(module.register_forward_hook(_taker(name, sums)))
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, wanted in before.items():
            parameter.requires_grad = wanted


def _begin_graph(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Below the first targets nothing needs a gradient: the graph begins at their inputs."""
    x, *rest = args
    return (x if x.requires_grad else x.detach().requires_grad_(), *rest)


def _taker(name: str, sums: dict[str, Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...], Any], None]:
    def watch(_module: nn.Module, args: tuple[Tensor, ...], y: Any) -> None:
        x = args[0].detach()
        version = x._version

        def take(dy: Tensor) -> None:
            if x._version != version:
                raise UnsupportedInit(f"{name}: the model overwrites this layer's input in place.", param="model")
            G = (dy.flatten(0, -2).T @ x.flatten(0, -2)).to("cpu", torch.float32)
            if name in sums:
                sums[name] += G
            else:
                sums[name] = G

        y.register_hook(take)  # untyped, hence Any

    return watch


def refuse_unusable(gradients: Mapping[str, Tensor]) -> None:
    """Gradients that no direction can be taken from, with the modules and the usual causes.

    Raises:
        InitFailed: not finite.
        UnsupportedInit: zero.
    """
    broken = [name for name, G in gradients.items() if not G.isfinite().all()]
    if broken:
        raise InitFailed(
            f"The gradient is not finite in {listed(broken)}: a base model that overflows on these rows, often for"
            " want of precision, is the usual cause.",
            param="lora.init",
        )
    dead = [name for name, G in gradients.items() if not G.any()]
    if dead:
        raise UnsupportedInit(
            f"The gradient is zero in {listed(dead)}: the calibration rows do not use the module, or their trained"
            " tokens do not depend on it. Leave it out of target_modules or give other rows.",
            param="lora.init",
        )
