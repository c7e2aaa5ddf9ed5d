"""Repeats work that runs out of memory: in smaller pieces while it can be made smaller, and then once more unchanged.

The caller says how to make it smaller. The memory of the failed attempt is released first. If a run has several
processes, all of them repeat the work together: at the next exchange between them each learns whether another failed.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

from lorainit.config.errors import OutOfMemory
from lorainit.runtime.devices import is_out_of_memory
from lorainit.runtime.distributed.run_errors import release_frames
from lorainit.runtime.distributed.world import SINGLE_PROCESS, World

T = TypeVar("T")
_CPU = torch.device("cpu")


class RanOutElsewhere(OutOfMemory):
    """Memory ran out in another process of this run, so what all had begun is done again, or has failed for all."""

    def __init__(self) -> None:
        super().__init__("Another process of this run ran out of memory.", param="training.max_length")


def any_rank(flag: bool, world: World, device: torch.device) -> bool:
    """Whether it is so in any process; the one way in which processes may talk to each other in `retry_until_it_fits`.

    Raises:
        RanOutElsewhere: one of them failed meanwhile, and does not answer this question.
    """
    return _share_outcome(flag, world, device, failed=False)


def _share_outcome(flag: bool, world: World, device: torch.device, *, failed: bool) -> bool:
    if world.size == 1:
        return flag
    found = torch.tensor([float(flag), float(failed)], device=device)
    world.all_reduce([found])
    answer, failures = found.tolist()
    if failures and not failed:
        raise RanOutElsewhere
    return bool(answer)


def _finish_together(work: Callable[[], T], world: World, device: torch.device) -> T:
    """What `work` returns. It has a frame of its own, which can be released if another process has failed."""
    found = work()
    any_rank(False, world, device)
    return found


def cannot_shrink() -> bool:
    """For work that cannot be made smaller."""
    return False


def retry_until_it_fits(
    work: Callable[[], T],
    shrink: Callable[[], bool] = cannot_shrink,
    *,
    world: World = SINGLE_PROCESS,
    device: torch.device = _CPU,
) -> T:
    """What `work` returns.

    Args:
        work: what an attempt that failed leaves behind must do the next one no harm. It may ask other processes by
            `any_rank`, all of them equally often, and may wait for them in no other way.
        smaller: called after each attempt that ran out of memory; makes the next one take less, and returns whether it
            does. One attempt is made all the same where it does not: memory was in pieces, or others have given
            theirs back.
        world: the processes that do this work side by side: all do it again where memory ran out in one of them.
        device: of this process.

    Raises:
        Exception: what `work` raised, if memory did not run out, or if nothing helped. Where processes make every pass
            together, the first attempt is the only one.
        RanOutElsewhere: nothing helped in another process.
    """
    is_last = False
    while True:
        try:
            return _finish_together(work, world, device)
        except Exception as caught:  # torch has one class for a GPU's memory and only a text for the host's
            is_ours = is_out_of_memory(caught)
            if world.in_step or not (is_ours or isinstance(caught, RanOutElsewhere)):
                raise
            error = caught
            release_frames(error)
        if is_ours:
            _share_outcome(False, world, device, failed=True)
        if not shrink():
            if is_last:
                raise error
            is_last = True
