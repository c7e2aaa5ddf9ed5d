"""The processes that train one run together, usually one. Each takes every n-th micro-batch.

Gradients are summed once per step and not sharded, because adapters are small. The order of rows and the effective
batch do not depend on the number of processes.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from lorainit.config.errors import DeviceSilent, TooFewDevices
from lorainit.runtime import machine_errors
from lorainit.runtime.distributed.launch import RENDEZVOUS, count_processes
from lorainit.system import watchdog

# Seconds that a collective may take longer than the watchdog allows, so that the watchdog ends a run that hangs: its
# message is clearer. This limit itself is for processes that are still waiting for the others to connect.
LATER = 60.0


@dataclass(frozen=True)
class World:
    """This process is number `rank` of `size`. `in_step`: the base is sharded, so every pass is made by all of them."""

    rank: int = 0
    size: int = 1
    in_step: bool = False

    @property
    def is_rank0(self) -> bool:
        """Whether this process emits the events and writes the files of the run."""
        return self.rank == 0

    @property
    def share(self) -> slice:
        """Which of a step's micro-batches this process takes."""
        return slice(self.rank, None, self.size)

    def count_idle_passes(self, pieces: int) -> int:
        """How many passes this process makes without rows of its own, because the others need its part of the base."""
        return -(-pieces // self.size) - len(range(pieces)[self.share]) if self.in_step else 0

    def any_rank(self, flag: bool, device: torch.device) -> bool:
        """Whether `flag` is true in any process."""
        if self.size == 1:
            return flag
        found = torch.tensor(float(flag), device=device)
        self.all_reduce([found])
        return bool(found)

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in place; one message for each dtype."""
        if self.size == 1:
            return
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            some = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.flatten() for t in some])
            distributed.all_reduce(flat)
            for tensor, part in zip(some, flat.split([t.numel() for t in some]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def broadcast_digest(self, digest: str, device: torch.device) -> str:
        """Rank 0's SHA-256 in hexadecimal digits; the argument counts on rank 0 only."""
        if self.size == 1:
            return digest
        numbers = list(bytes.fromhex(digest)) if self.is_rank0 else [0] * 32
        digest_bytes = torch.tensor(numbers, dtype=torch.uint8, device=device)
        self.broadcast([digest_bytes])
        return bytes(digest_bytes.tolist()).hex()

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Give every process the tensors of rank 0, in place."""
        if self.size > 1:
            for tensor in tensors:
                distributed.broadcast(tensor.detach(), src=0)


SINGLE_PROCESS = World()


@contextmanager
def join_world(device: torch.device) -> Iterator[World]:
    """Join the other processes that `launch` or torchrun has started, and leave them when the context ends.

    Raises:
        TooFewDevices: there are more processes than GPUs.
        DeviceSilent: not all processes joined in time.
    """
    size = count_processes()
    if size == 1:
        yield SINGLE_PROCESS
        return
    rank = int(os.environ["RANK"])
    if device.type == "cuda":
        _select_gpu(int(os.environ.get("LOCAL_RANK", rank)), size)
    backend = "nccl" if device.type == "cuda" else "gloo"
    # Not by a `file://` URL, because torch does not decode it: a path with a space would become one with "%20".
    file = os.environ.get(RENDEZVOUS)
    meeting: dict[str, Any] = {"init_method": "env://"}
    if file:
        meeting = {"store": distributed.FileStore(file, size)}  # type: ignore[attr-defined]
    timeout = timedelta(seconds=watchdog.time_limit() + LATER)
    try:
        distributed.init_process_group(backend, rank=rank, world_size=size, timeout=timeout, **meeting)
    except RuntimeError as error:
        if machine_errors.find_peer_failure(error) is None:
            raise
        within = f"{timeout.total_seconds():.0f} seconds"
        text = f"Not all {size} processes of this run connected within {within}: one hangs or has ended."
        raise DeviceSilent(text) from error
    try:
        yield World(rank, size)
    finally:
        distributed.destroy_process_group()


def _select_gpu(local_rank: int, size: int) -> None:
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise TooFewDevices(f"The run is for {size} devices, and its worker sees {count}.", param="devices")
    torch.cuda.set_device(local_rank)
