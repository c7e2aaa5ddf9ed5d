"""What a worker's runs compute on (GPUs of its own for each slot, or the processor), and why a worker takes no job.

`LORAINIT_WORKER_DEVICE` sets it. A worker decides once, when it starts: if its GPU disappears later, it takes no more
jobs and does not go on with the processor. The reasons are in docs/decisions/0060.
"""

import threading
import time
from typing import Literal

from api.core.logs import get_logger
from api.core.settings import get_settings
from api.core.singleton import singleton
from lorainit.system import driver, gpus

Device = Literal["gpu", "cpu"]
AGAIN_SECONDS = 60.0  # until a driver that did not answer is asked again
# Queues of jobs that ask for one kind of device; a worker of the other kind takes none of them.
_OTHER: dict[Device, str] = {"gpu": "cpu", "cpu": "gpu"}

log = get_logger(__name__)


@singleton
def device() -> Device:
    """What this worker's runs compute on. Called before its processes are forked, so that all have the same answer.

    A driver that does not answer counts as a GPU, because only a machine with GPUs has one.
    """
    hangs, wanted = find_silence(), get_settings().worker_device
    if wanted != "auto":
        return wanted
    return "gpu" if hangs or not gpus.explain_no_gpu() else "cpu"


def list_gpus() -> list[str]:
    """The GPUs that this worker shares out, as `CUDA_VISIBLE_DEVICES` names them."""
    return gpus.list_visible() if device() == "gpu" else []


def find_gpus_of_slot(slot: int, slots: int) -> str | None:
    """`CUDA_VISIBLE_DEVICES` of a slot's runs; None leaves the environment as it is.

    The GPUs are shared out evenly, so that each slot has as many as a job may ask for (`_too_few`).
    """
    if device() == "cpu":
        return ""
    found = list_gpus()
    if slots == 1 or not found:
        return None
    share = len(found) // slots
    return ",".join(found[slot * share : (slot + 1) * share])


def list_served_queues() -> tuple[str, ...]:
    """The queues that this worker takes jobs from, without the queue of the device that it does not use."""
    return tuple(name for name in get_settings().queues() if name != _OTHER[device()])


def may_take_a_job(slots: int) -> bool:
    """Whether this worker has no problem (`find_problem`). A problem is logged."""
    why = find_problem(slots)
    if why:
        log.error("no job is taken", reason=why)
    return not why


def find_problem(slots: int) -> str | None:
    """Why no slot takes a job: GPUs that cannot be used, too few of them for the slots, or no queue that is left."""
    if why := _no_queue():
        return why
    if device() == "cpu":
        return None
    return find_silence() or _no_gpu() or gpus.find_problem() or _unknown() or _too_many(slots) or _too_few(slots)


def find_silence() -> str | None:
    """A sentence if the NVIDIA driver does not answer; None if it does, or if this worker uses no GPU."""
    is_asked = get_settings().worker_device != "cpu" and gpus.may_be_used()
    return _driver().silence() if is_asked else None


def _no_queue() -> str | None:
    if list_served_queues():
        return None
    asked, uses = get_settings().worker_queues, {"gpu": "GPUs", "cpu": "the processor"}[device()]
    return f"LORAINIT_WORKER_QUEUES names {asked} alone, and this worker uses {uses}: it may take none of these jobs."


def _no_gpu() -> str | None:
    why = gpus.explain_no_gpu()
    if not why:
        return None
    if get_settings().worker_device == "auto":
        return f"This worker began with GPUs, and now {why}."
    return f"LORAINIT_WORKER_DEVICE is gpu, and {why}."


def _unknown() -> str | None:
    listed = _driver().listed
    why = None if listed is None else driver.find_name_problem(list_gpus(), listed)
    return f"{gpus.VISIBLE} {why}." if why else None


def _too_many(slots: int) -> str | None:
    count = len(list_gpus())
    if slots <= count:
        return None
    return f"LORAINIT_WORKER_SLOTS is {slots}, and this worker sees {count} GPUs: name more, or lower it."


def _too_few(slots: int) -> str | None:
    """Why a slot has too few GPUs: it would take jobs for several devices, and they would fail."""
    share, promised = len(list_gpus()) // slots, get_settings().devices_per_job
    if promised > 1 and _has_instances():
        return (
            f"LORAINIT_DEVICES_PER_JOB lets a job ask for {promised} devices, and this worker has instances of divided"
            " GPUs (MIG), of which a process uses one: lower it to 1, or name whole GPUs."
        )
    if promised <= share:
        return None
    return (
        f"LORAINIT_DEVICES_PER_JOB lets a job ask for {promised} devices, and a slot of this worker has {share}: name"
        " more GPUs, or lower it or LORAINIT_WORKER_SLOTS."
    )


def _has_instances() -> bool:
    """Whether a GPU is divided. Its name may not show that, because CUDA also accepts the whole GPU's name."""
    named = list_gpus()
    if any(name.upper().startswith("MIG-") for name in named):
        return True
    divided = [gpu for gpu in _driver().listed or () if gpu.instances]
    if any(name.isdecimal() for name in named):  # CUDA may count in another order than the driver lists
        return bool(divided)
    return any(gpu.identity.lower().startswith(name.lower()) for gpu in divided for name in named)


class _Driver:
    """Asks the NVIDIA driver for its GPUs and keeps the answer. If none came, it asks again after a minute."""

    def __init__(self) -> None:
        self.listed: list[driver.Gpu] | None = None
        self._has_answered = False
        self._silence: str | None = None
        self._ask_at = 0.0  # on the monotonic clock

    def silence(self) -> str | None:
        """Why the driver did not answer the last time, or None. Asking also makes GPUs appear in /dev after a boot."""
        if not self._has_answered and time.monotonic() >= self._ask_at:
            self._ask_at = time.monotonic() + AGAIN_SECONDS
            if self._silence is None:
                self._ask()
            else:  # the caller sends the worker's heartbeat and must not wait
                threading.Thread(target=self._ask, name="nvidia-smi", daemon=True).start()
        return self._silence

    def _ask(self) -> None:
        try:
            self.listed = driver.list_gpus()
        except driver.DriverSilent as silent:
            self._silence = str(silent)
        else:
            self._has_answered, self._silence = True, None


@singleton
def _driver() -> _Driver:
    return _Driver()


def forget() -> None:
    """Forget the decision and the driver's answer."""
    device.cache_clear()
    _driver.cache_clear()
