"""The inputs of the targets, collected in one forward pass for all of them. Padding is never used.

Layers that get the same tensor object (the query, key and value projections of a block) share one computation, since
their statistics are the same.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lorainit.config.errors import InitFailed, UnsupportedInit
from lorainit.config.inits.data import EVA, CorDA
from lorainit.context import Run
from lorainit.data.batches import collate
from lorainit.data.dataset import Sample
from lorainit.init.collectors.rows import warn_few_rows
from lorainit.model.forward.loss import logits_of
from lorainit.model.layers.experts import ExpertLinear
from lorainit.model.targets.names import list_first

OnInputs = Callable[[str, Tensor, list[int]], None]


def choose_calibration_rows(config: EVA | CorDA, run: Run) -> Sequence[Sample]:
    """The first `samples` rows. If there are fewer, a warning is emitted.

    Raises:
        UnsupportedInit: there are none.
    """
    rows = run.samples[: config.samples]
    if not rows:
        raise UnsupportedInit("This method needs calibration rows, and there are none.", param="data.calibration")
    if len(rows) < config.samples:
        run.emit(warn_few_rows(config, len(rows)))
    return rows


def find_shared_inputs(run: Run, piece: Sequence[Sample]) -> dict[str, str]:
    """For each target the first target that gets the same tensor object as its input; itself if it is the first.

    Experts share nothing. Whether tokens reach them is not checked here, because one batch cannot tell.

    Raises:
        UnsupportedInit: a target is not reached at all.
    """
    # The tensors are kept until the pass is over, because Python may give the id of a freed tensor to another one.
    seen: dict[int, tuple[str, Tensor]] = {}
    leader = {name: name for name, module in run.targets.items() if isinstance(module, ExpertLinear)}
    others = {name: module for name, module in run.targets.items() if name not in leader}

    def note(name: str, x: Tensor) -> None:
        leader.setdefault(name, seen.setdefault(id(x), (name, x))[0])

    batch = collate(piece, pad=run.base.pad).to(run.device)
    with torch.no_grad(), _hooked(others, note):
        logits_of(run.model, batch)
    unreached = [name for name in run.targets if name not in leader]
    if unreached:
        raise UnsupportedInit(f"The calibration rows never reach {list_first(unreached)}.", param="lora.target_modules")
    return {name: leader[name] for name in run.targets}


@torch.no_grad()
def collect_inputs(
    run: Run, piece: Sequence[Sample], names: Iterable[str], on_inputs: OnInputs, *, tokens: str
) -> None:
    """Run the model on one batch, and call `on_inputs(name, X, counts)` for each named target.

    `X` has the inputs of the chosen tokens, tokens×in float32. `counts` has the number of these tokens in each row.

    Args:
        tokens: "trained" for the trained tokens only, or "all" for all but padding.

    Raises:
        InitFailed: an input is not finite.
        UnsupportedInit: the shape of an input does not tell which tokens are padding.
    """
    batch = collate(piece, pad=run.base.pad).to(run.device)
    mask = batch.attention.bool() & batch.trained if tokens == "trained" else batch.attention.bool()

    def select(name: str, x: Tensor) -> None:
        positions = _positions(name, run.targets[name], x, mask)
        wanted = mask.flatten()[positions]
        X = x.flatten(0, -2)[wanted].float()
        if not X.isfinite().all():
            raise InitFailed(f"{name}: its inputs are not finite on the calibration rows.", param="lora.init")
        on_inputs(name, X, torch.bincount(positions[wanted] // mask.shape[1], minlength=len(mask)).tolist())

    with _hooked({name: run.targets[name] for name in names}, select):
        logits_of(run.model, batch)


def _positions(name: str, module: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """The positions of a layer's input tokens in the flattened rows×length, in ascending order."""
    if isinstance(module, ExpertLinear) and module.stack.of == mask.numel():
        assert module.stack.tokens is not None
        return module.stack.tokens
    # The keys of latent attention have an axis for the one head that all share: rows×1×tokens×features.
    shared_head = x.ndim == 4 and (x.shape[0], *x.shape[2:-1]) == mask.shape and x.shape[1] == 1
    known = shared_head or x.shape[:-1] in (mask.shape, (mask.numel(),))
    if known and not isinstance(module, ExpertLinear):
        return torch.arange(mask.numel(), device=mask.device)
    raise UnsupportedInit(
        f"{name}: its inputs come as {tuple(x.shape)}, not as rows x tokens x features: which of them are"
        " padding cannot be told.",
        param="lora.target_modules",
    )


@contextmanager
def _hooked(targets: dict[str, nn.Module], on_inputs: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `on_inputs(name, input)` before each target runs."""

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, args: on_inputs(name, args[0])

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in targets.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
