"""Checks that the evidence will fit into memory before it is collected.

This matters because a mixture of experts has thousands of matrices, and some methods keep something as large as a
matrix for each of them.
"""

import torch

from lorainit.config.errors import OutOfMemory
from lorainit.config.events import Message
from lorainit.context import Run
from lorainit.model.layers.experts import ExpertLinear
from lorainit.runtime import devices

FLOAT = 4
GIB = 2**30


def require_memory(run: Run, what: str, *, numbers: int, device: torch.device) -> None:
    """Refuse evidence that does not fit. If experts are adapted, report how much memory it takes.

    Args:
        what: names the evidence in messages; begins with the method's name.
        numbers: how many float32 numbers are in memory at a time.
        device: the device that holds them.

    Raises:
        OutOfMemory: they take more memory than is free in any process of the run.
    """
    wanted, free = FLOAT * numbers, devices.free_bytes(device)
    is_short = free is not None and wanted > free
    if run.any_rank(is_short):
        available = f"{_gib(free or 0)} are free" if is_short else "another process of this run has less than that free"
        experts = sum(isinstance(module, ExpertLinear) for module in run.targets.values())
        hint = f" {experts} of the {len(run.targets)} adapted matrices are experts'." if experts else ""
        raise OutOfMemory(
            f"{what} takes {_gib(wanted)} of memory, and {available}.{hint} Fewer target modules"
            ' ("attention" leaves experts out), or a method that keeps less, such as pissa or kaiming, help.',
            param="lora.init",
        )
    if any(isinstance(module, ExpertLinear) for module in run.targets.values()):
        text = f"{what} takes {_gib(wanted)} of memory until the layers are initialized"
        run.emit(Message(message=text, data={"kind": "init", "evidence_bytes": wanted}))


def _gib(size: int) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB else f"{size / 2**20:,.1f} MiB"
