"""Work that runs out of memory is done again: with less at a time, and at the end once more as it is.

What is made smaller is up to whoever asks. What the failed attempt held is given back first.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

from lorainit.config.errors import OutOfMemory
from lorainit.runtime.distributed.isolation import forget
from lorainit.runtime.distributed.world import ALONE, World
from lorainit.runtime.hardware import is_out_of_memory

T = TypeVar("T")
_CPU = torch.device("cpu")


def nothing_smaller() -> bool:
    """For work that cannot be made smaller."""
    return False


def until_it_fits(
    work: Callable[[], T],
    smaller: Callable[[], bool] = nothing_smaller,
    *,
    world: World = ALONE,
    device: torch.device = _CPU,
) -> T:
    """What `work` returns.

    Args:
        work: what an attempt that failed leaves behind must do the next one no harm. No process may wait in it for
            another one.
        smaller: called after each attempt that ran out of memory; makes the next one take less, and returns whether it
            does. One attempt is made all the same where it does not: memory was in pieces, or others have given
            theirs back.
        world: the processes that do this work side by side: all do it again where memory ran out in one of them.
        device: of this process.

    Raises:
        Exception: what `work` raised, if memory did not run out, or if nothing helped. Where processes make every pass
            together, the first attempt is the only one.
        OutOfMemory: nothing helped in another process.
    """
    is_last = False
    while True:
        error = None
        try:
            found = work()
        except Exception as caught:  # torch has one class for a GPU's memory and only a text for the host's
            if world.in_step or not is_out_of_memory(caught):
                raise
            error = caught
            forget(error)
        if not world.anybody(error is not None, device):
            return found
        if not smaller():
            if is_last:
                raise error or OutOfMemory(
                    "Another process of this run ran out of memory.", param="training.max_length"
                )
            is_last = True
