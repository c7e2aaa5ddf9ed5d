"""Which GPUs each slot of this worker has. No two slots share one, and none runs where its GPUs cannot be used."""

from api.core.logs import get_logger
from api.core.settings import get_settings
from lorainit import gpus

log = get_logger(__name__)


def may_take_a_job(slots: int) -> bool:
    """False where there is `trouble`, which the log tells."""
    why = trouble(slots)
    if why:
        log.error("no job is taken: the GPUs cannot be used", reason=why)
    return not why


def trouble(slots: int) -> str | None:
    """Why no slot takes a job: GPUs are meant to be used and cannot be, slots would share one, or have too few."""
    return gpus.trouble() or _too_many(slots) or _too_few(slots)


def of_slot(slot: int, slots: int) -> str | None:
    """`CUDA_VISIBLE_DEVICES` of a slot's runs; None leaves the environment as it is.

    The worker's GPUs are dealt out evenly, so that a job for two devices finds them where each slot has two.
    """
    names = gpus.visible()
    if slots == 1 or not names:
        return None
    share = len(names) // slots
    return ",".join(names[slot * share : (slot + 1) * share])


def _too_many(slots: int) -> str | None:
    count = len(gpus.visible())
    if not count or slots <= count:
        return None
    return f"LORAINIT_WORKER_SLOTS is {slots}, and this worker sees {count}: name more, or MIG instances, or lower it."


def _too_few(slots: int) -> str | None:
    """A job for several devices that a slot without them took would only fail there."""
    share, promised = len(gpus.visible()) // slots, get_settings().devices_per_job
    if not share or promised <= share:
        return None
    return (
        f"LORAINIT_DEVICES_PER_JOB lets a job ask for {promised} devices, and a slot of this worker has {share}: name"
        " more GPUs, or lower it or LORAINIT_WORKER_SLOTS."
    )
