"""Is there room for the evidence? Asked before it is collected.

A mixture of experts has thousands of matrices, and some methods keep something as large as a matrix for each of them.
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
    """Refuse what does not fit; of a mixture, say what it takes.

    Args:
        what: what is kept, beginning with the method's name.
        numbers: how many float32 numbers lie there at a time.

    Raises:
        OutOfMemory: they take more than is free in any process of the run.
    """
    wanted, free = FLOAT * numbers, devices.free_bytes(device)
    is_short = free is not None and wanted > free
    if run.any_rank(is_short):
        room = f"{_gib(free or 0)} are free" if is_short else "another process of this run has less than that free"
        experts = sum(isinstance(module, ExpertLinear) for module in run.targets.values())
        hint = f" {experts} of the {len(run.targets)} adapted matrices are experts'." if experts else ""
        raise OutOfMemory(
            f"{what} takes {_gib(wanted)} of memory, and {room}.{hint} Fewer target modules"
            ' ("attention" leaves experts out), or a method that keeps less, such as pissa or kaiming, help.',
            param="lora.init",
        )
    if any(isinstance(module, ExpertLinear) for module in run.targets.values()):
        text = f"{what} takes {_gib(wanted)} of memory until the layers have started from it"
        run.emit(Message(message=text, data={"kind": "init", "evidence_bytes": wanted}))


def _gib(size: int) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB else f"{size / 2**20:,.1f} MiB"
