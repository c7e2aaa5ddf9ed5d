"""Second moments of the targets' inputs (CorDA)."""

from functools import partial

import torch
from torch import Tensor

from lorainit.config.errors import InitFailed, UnsupportedInit
from lorainit.config.events import Tick
from lorainit.config.inits.data import CorDA
from lorainit.context import Run
from lorainit.data.batches import split_into_batches
from lorainit.init.collectors import memory
from lorainit.init.collectors.inputs import choose_calibration_rows, collect_inputs, find_shared_inputs
from lorainit.init.evidence import Evidence
from lorainit.model.layers.experts import ExpertLinear
from lorainit.model.layers.weight import shape_of
from lorainit.model.targets.names import list_first

# The most bytes of second moments on an accelerator at a time, so that most of its memory is left for the passes. More
# moments than that are collected in several blocks.
DEVICE_BYTES = 4 << 30


def collect_second_moments(config: CorDA, run: Run) -> dict[str, Evidence]:
    """Mean over rows of XᵀX for each layer, in×in float32, where X is the row's inputs divided by their `_size`.

    The results are on the CPU and take in² · 4 bytes for every group of layers that share an input. An accelerator
    holds `DEVICE_BYTES` of them at a time, so a large model needs one more pass over the rows for each block.
    Experts share no input; those that no token reaches are `starved`.

    Raises:
        UnsupportedInit: a layer's inputs cannot be masked, or no input but zeros reaches it.
        InitFailed: a layer's inputs are not finite.
        OutOfMemory: the moments take more memory than is free.
    """
    rows = choose_calibration_rows(config, run)
    pieces = split_into_batches(rows, run.evidence_budget, run.regime)
    leader = find_shared_inputs(run, pieces[0])
    sides = {g: shape_of(run.targets[g])[1] for g in dict.fromkeys(leader.values())}
    moments: dict[str, Tensor] = {}
    what, numbers = "corda's second moment of every layer's inputs", sum(n * n for n in sides.values())
    memory.require_memory(run, what, numbers=numbers, device=torch.device("cpu"))
    blocks = _blocks(sides, DEVICE_BYTES if run.device.type != "cpu" else None)
    for done, block in enumerate(blocks):
        for number, piece in enumerate(pieces, start=1):
            collect_inputs(run, piece, block, partial(_add_moments, moments, config), tokens="all")
            run.emit(Tick(done=done * len(pieces) + number, total=len(blocks) * len(pieces)))
        for name in moments.keys() & block:
            moments[name] = (moments[name] / len(rows)).cpu()
    silent = [name for name in sides if name not in moments or not moments[name].any()]
    starved = {name for name in silent if isinstance(run.targets[name], ExpertLinear)}
    _refuse_moments(moments, [name for name in silent if name not in starved])
    return {
        name: Evidence(starved=True, rows=len(rows))
        if name in starved
        else Evidence(second_moment=moments[g], rows=len(rows))
        for name, g in leader.items()
    }


def _add_moments(sums: dict[str, Tensor], config: CorDA, name: str, X: Tensor, counts: list[int]) -> None:
    for row in torch.split_with_sizes(X, counts):
        if not len(row):  # no token of this row was routed to the expert
            continue
        scaled = row / _size(row, config).clamp(min=torch.finfo(row.dtype).tiny)
        C = scaled.T @ scaled
        sums[name] = sums[name].add_(C) if name in sums else C


def _size(row: Tensor, config: CorDA) -> Tensor:
    """What a row's inputs are divided by: max|x|, or |max x| as in the authors' code, which may be close to zero."""
    return row.max().abs() if config.balance == "authors" else row.abs().max()


def _blocks(sides: dict[str, int], limit: int | None) -> list[list[str]]:
    """Consecutive layers whose moments fit together into `limit` bytes (None = no limit)."""
    blocks: list[list[str]] = [[]]
    used = 0
    for name, n in sides.items():
        used += 4 * n * n
        if limit is not None and used > limit and blocks[-1]:
            blocks.append([])
            used = 4 * n * n
        blocks[-1].append(name)
    return blocks


def _refuse_moments(moments: dict[str, Tensor], silent: list[str]) -> None:
    if silent:
        raise UnsupportedInit(f"No input but zeros reached {list_first(silent)}.", param="lora.init")
    broken = [name for name, C in moments.items() if not C.isfinite().all()]
    if broken:
        raise InitFailed(
            f"The second moment of the inputs is not finite in {list_first(broken)}: the largest entry of a row is"
            ' close to zero, and the authors\' rule divides by it. With balance "equal" it is the largest absolute'
            " entry.",
            param="lora.init.balance",
        )
