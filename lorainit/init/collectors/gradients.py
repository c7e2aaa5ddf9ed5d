"""The mean full gradient of every target's weight over a few calibration rows.

The loss is the mean over rows of each row's mean loss over its trained tokens, so short rows count as much as long
ones. LoRA-GA and LoRA-One compute the same, because they use micro-batches of one row. Here rows may share a forward
pass, which changes only the speed.
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
from lorainit.data.batches import Budget, Regime, any_length, collate, split_into_batches
from lorainit.data.dataset import Sample
from lorainit.init.collectors import memory
from lorainit.init.collectors.rows import warn_few_rows
from lorainit.init.evidence import Evidence
from lorainit.model.forward.loss import NEXT_TOKEN, Objective, backward
from lorainit.model.layers.experts import ExpertLinear
from lorainit.model.layers.weight import shape_of
from lorainit.model.targets.names import list_first

OnTick = Callable[[int, int], None]


def collect_gradients(config: LoRAGA | LoRAOne, run: Run) -> dict[str, Evidence]:
    """The gradient of each target over the first rows.

    Experts with a zero gradient are `starved`.

    Raises:
        UnsupportedInit: no row has a trained token, or the gradient of a module is zero.
        InitFailed: a gradient is not finite.
        OutOfMemory: the gradients take more than is free.
    """
    rows = choose_calibration_rows(config, run)
    numbers = sum(out * n for out, n in map(shape_of, run.targets.values()))
    what = f"{config.method}'s gradient of every matrix"
    memory.require_memory(run, what, numbers=numbers, device=torch.device("cpu"))

    def tick(done: int, total: int) -> None:
        run.emit(Tick(done=done, total=total))

    found = compute_mean_gradients(
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
    # If no token was routed to an expert, its gradient is zero and gives no direction for a start.
    starved = {n for n, G in found.items() if isinstance(run.targets[n], ExpertLinear) and not G.any()}
    refuse_unusable({name: G for name, G in found.items() if name not in starved})
    return {
        name: Evidence(starved=True, rows=len(rows)) if name in starved else Evidence(gradient=G, rows=len(rows))
        for name, G in found.items()
    }


def split_rows(config: LoRAGA | LoRAOne, run: Run) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """The first `samples` rows that have a trained token, and as many of those after them, as far as there are any."""
    usable = [s for s in run.samples if s.trained[1:].any()]
    return usable[: config.samples], usable[config.samples : 2 * config.samples]


def choose_calibration_rows(config: LoRAGA | LoRAOne, run: Run) -> Sequence[Sample]:
    """The first `samples` rows that have a trained token. If there are fewer, a warning is emitted.

    Raises:
        UnsupportedInit: there are none.
    """
    rows, _ = split_rows(config, run)
    if not rows:
        raise UnsupportedInit(
            f"{config.method} takes its start from the gradient, and no calibration row has a trained token.",
            param="lora.init",
        )
    if len(rows) < config.samples:
        run.emit(warn_few_rows(config, len(rows)))
    return rows


def compute_mean_gradients(
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
        model: which parameters need a gradient is restored afterwards; its mode is not changed.
        budget: the limit of a forward pass.
        regime: tells which rows may share a pass.
        on_tick: called with (rows done, rows) after every pass.
    """
    sums: dict[str, Tensor] = {}
    done = 0
    with _gradients_taken_away(model, targets, sums):
        for piece in split_into_batches(rows, budget, regime):
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
    """Add each target's gradient to `sums` during the backward pass, so that the device holds one of them at a time.

    The gradient is calculated from the layer's inputs and the gradient of its outputs. The weights stay frozen, because
    a quantized weight cannot have a gradient.
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
    """Let the graph begin at the input of the first targets: nothing before them needs a gradient."""
    x, *rest = args
    return (x if x.requires_grad else x.detach().requires_grad_(), *rest)


def _taker(name: str, sums: dict[str, Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...], Any], None]:
    def watch(_module: nn.Module, args: tuple[Tensor, ...], y: Any) -> None:
        x = args[0].detach()
        version = x._version

        def take(dy: Tensor) -> None:
            if x._version != version:  # the gradient would be wrong, because it is calculated from the input
                raise UnsupportedInit(f"{name}: the model overwrites this layer's input in place.", param="model")
            G = (dy.flatten(0, -2).T @ x.flatten(0, -2)).to("cpu", torch.float32)
            if name in sums:
                sums[name] += G
            else:
                sums[name] = G

        y.register_hook(take)  # `y` is Any, because `register_hook` has no types

    return watch


def refuse_unusable(gradients: Mapping[str, Tensor]) -> None:
    """Refuse gradients that give no direction for a start. The message names the modules and the usual causes.

    Raises:
        InitFailed: a gradient is not finite.
        UnsupportedInit: a gradient is zero.
    """
    broken = [name for name, G in gradients.items() if not G.isfinite().all()]
    if broken:
        raise InitFailed(
            f"The gradient is not finite in {list_first(broken)}: usually the base model overflows on these rows, often"
            " because the precision is too low.",
            param="lora.init",
        )
    dead = [name for name, G in gradients.items() if not G.any()]
    if dead:
        raise UnsupportedInit(
            f"The gradient is zero in {list_first(dead)}: the calibration rows do not use the module, or their trained"
            " tokens do not depend on it. Leave it out of target_modules or give other rows.",
            param="lora.init",
        )
