"""Repeats work that runs out of memory: in smaller pieces as long as possible, and then once more unchanged.

The caller says how to make it smaller. The memory of the failed attempt is released first. If a run has several
processes, all of them repeat the work together, because otherwise one would wait for another that has started again:
at the next exchange between them each process learns whether another one failed.
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
    """Memory ran out in another process of this run, so all processes repeat the work, or it has failed for all."""

    def __init__(self) -> None:
        super().__init__("Another process of this run ran out of memory.", param="training.max_length")


def any_rank(flag: bool, world: World, device: torch.device) -> bool:
    """Whether `flag` is true in any process. Inside `retry_until_it_fits` processes may communicate by this only.

    Raises:
        RanOutElsewhere: another process ran out of memory before it came to this call.
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
    """What `work` returns, after waiting for the other processes.

    A function of its own, so that its frame with the result can be released if another process has failed.
    """
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
    """Call `work` until it does not run out of memory; return its result.

    Args:
        work: may be called several times, so a failed attempt must leave nothing that disturbs the next one. It may
            communicate with other processes by `any_rank` only, and every process must call that equally often.
        shrink: called after each attempt that ran out of memory. It makes the next attempt smaller and returns True, or
            returns False if it cannot. Then one more attempt is made unchanged, because free memory may have been
            fragmented, or other processes may have released some.
        world: the processes that do this work side by side; if one runs out of memory, all repeat the work.
        device: the device of this process.

    Raises:
        Exception: what `work` raised, if memory did not run out, or if the last attempt failed. If all processes make
            every pass together (`World.in_step`), nothing is repeated.
        RanOutElsewhere: the last attempt failed in another process.
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
