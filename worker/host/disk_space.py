"""Checks before a job starts whether this host has enough disk space, by an estimate of what the job writes.

A job that does not fit now waits in the queue, because the operator has to free space and failing a thousand queued
jobs would not help. A job that would not fit on the empty volume can never run, so it fails.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from api.core.db.tables import Job
from api.core.files import disk
from api.core.files.disk import Volume, format_bytes
from api.core.jobs.jobs import Failure
from api.core.logs import get_logger
from api.core.models import catalogue
from api.core.models.catalogue import Entry
from api.core.settings import Settings, get_settings
from lorainit.config.spec import Lora
from worker.host import reservations

FLOAT = 4  # bytes, because states are written in fp32
# Copies of the trained factors: A and B, their start where that is subtracted, AdamW's two moments,
# and the plain adapter, whose rank is twice that then.
# LoRAM at rank 16 on SmolLM2 (19.5 MB of factors) wrote 121 MB of state where this and a tokenizer say 138.
ADAPTER_COPIES, STATE_COPIES = 2, 6
# At the same time in scratch: the checkpoint being written, the one being uploaded with its two archives, the one
# from which the run resumed, the final adapter with its archive.
SCRATCH_COPIES = 4 * STATE_COPIES + 3 * ADAPTER_COPIES
TOKENIZER_BYTES = 20 * 2**20  # stored with every adapter; Llama 3's has 17 MB
EMBEDDINGS = 1.5  # of a whole base over its linear layers; SmolLM2 has 1.27
ASK_AGAIN_SECONDS = 300.0  # after which a job is claimed again anyway, because another one may need less space

log = get_logger(__name__)


class WaitForDiskSpace(Exception):
    """There is not enough space now; the message says how much is missing and where."""


class DoesNotFit(Exception):
    """The job does not fit on this host's volumes even when they are empty."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@dataclass(frozen=True)
class DeviceNeed:
    """Volumes on one device and the bytes that a job writes to them together."""

    volumes: Sequence[Volume]
    needed: int

    @property
    def device(self) -> int:
        """The device's number."""
        return self.volumes[0].device

    def free(self, reserved: Mapping[int, int]) -> int:
        """Bytes on the device that are free and not `reserved` by other runs."""
        return self.volumes[0].free - reserved.get(self.device, 0)

    @property
    def name(self) -> str:
        """`scratch and storage`."""
        return " and ".join(volume.name for volume in self.volumes)


# The space for which the last job was requeued, and when. One value is enough: this process runs one job at a time.
_waiting_for: tuple[DeviceNeed, float] | None = None


def has_space_for_any_job() -> bool:
    """May this worker take a job?

    No if less than the minimum is free, if a volume cannot be written to, or while the space that the last job waited
    for is still missing.
    """
    global _waiting_for
    settings = get_settings()
    for volume in disk.list_worker_volumes(settings):
        if volume.free < settings.min_free_bytes:
            log.warning("too little disk space to take a job", volume=volume.name, free=volume.free)
            return False
        if volume.name != "model cache" and not _can_be_written(volume):  # which may be complete and read-only
            return False
    if _waiting_for is not None:
        need, since = _waiting_for
        if (
            need.free(reservations.sum_outstanding(settings)) < need.needed
            and time.monotonic() - since < ASK_AGAIN_SECONDS
        ):
            return False
        _waiting_for = None
    return True


def _can_be_written(volume: Volume) -> bool:
    try:
        volume.probe()
    except OSError as error:
        log.warning("a volume cannot be written to; no job is taken", volume=volume.name, error=str(error))
        return False
    return True


def reserve_for_job(job: Job, *, data_bytes: int, folder: Path) -> None:
    """Reserve the space that the job needs, beside what other runs of this host have reserved.

    Missing space is remembered for `has_space_for_any_job`.

    Args:
        data_bytes: size of its files.
        folder: its scratch folder, which this process has locked.

    Raises:
        WaitForDiskSpace: it has to wait.
        DoesNotFit: it cannot run on this host.
    """
    global _waiting_for
    settings = get_settings()
    with reservations.lock_reservations(settings):
        reserved = reservations.sum_outstanding(settings, besides=folder)
        needed = estimate_needs(job, settings, data_bytes=data_bytes)
        for need in needed:
            if need.needed > need.volumes[0].size:
                raise DoesNotFit(
                    Failure("disk_full", _sentence(need, f"has {format_bytes(need.volumes[0].size)} altogether"))
                )
            if need.needed > need.free(reserved):
                _waiting_for = (need, time.monotonic())
                raise WaitForDiskSpace(_sentence(need, _describe_free(need, reserved)))
        reservations.reserve(folder, {need.device: need.needed for need in needed})


def _describe_free(need: DeviceNeed, reserved: Mapping[int, int]) -> str:
    others = reserved.get(need.device, 0)
    kept = f", of which other runs have reserved {format_bytes(others)}" if others else ""
    return f"has {format_bytes(need.volumes[0].free)} free{kept}"


def estimate_needs(job: Job, settings: Settings, *, data_bytes: int) -> list[DeviceNeed]:
    """What the job needs by device: folders on one disk share its space."""
    needed = _estimate_by_volume(job, settings, data_bytes=data_bytes)
    volumes = sorted(disk.list_worker_volumes(settings), key=lambda volume: volume.device)
    devices = [list(group) for _, group in groupby(volumes, key=lambda volume: volume.device)]
    return [DeviceNeed(group, sum(needed[volume.name] for volume in group)) for group in devices]


def _estimate_by_volume(job: Job, settings: Settings, *, data_bytes: int) -> Mapping[str, int]:
    entry, lora = catalogue.require(job.model), Lora.model_validate(job.recipe["lora"])
    factors = catalogue.count_parameters(lora, entry)[1] * FLOAT
    checkpoints = settings.keep_checkpoints + 2  # the best one, and the new one before an old one goes
    adapter, state = ADAPTER_COPIES * factors + TOKENIZER_BYTES, STATE_COPIES * factors + TOKENIZER_BYTES
    return {
        "scratch": data_bytes + SCRATCH_COPIES * factors + 7 * TOKENIZER_BYTES,
        "model cache": _estimate_conversion(entry, settings),
        "storage": checkpoints * (adapter + state) + adapter,
    }


def _estimate_conversion(entry: Entry, settings: Settings) -> int:
    """Bytes of a GGUF base model that is not converted yet."""
    stem = entry.source.rpartition("/")[2].removesuffix(".gguf")
    if not entry.source.endswith(".gguf") or any(settings.models().glob(f"{stem}-*")):
        return 0
    linear = sum(target.out_features * target.in_features * target.count for target in entry.targets)
    return math.ceil(linear * FLOAT * EMBEDDINGS)


def _sentence(need: DeviceNeed, has: str) -> str:
    return f"This job needs about {format_bytes(need.needed)} of disk for {need.name}; the worker's volume {has}."
