"""Errors of runs that share a process: an error in the work of one run ends that run, and the others go on.

Decides which run an error belongs to, translates failures of the machine into our own errors with advice, and releases
the memory that a failed run still holds.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from lorainit.config.errors import (
    DeviceSilent,
    DiskFull,
    HostFailed,
    LorainitError,
    OutOfMemory,
    SharedMemoryFull,
    Stopped,
    UnsupportedModel,
    UnusableDevice,
)
from lorainit.config.events import Event, OnEvent
from lorainit.runtime import devices, machine_errors
from lorainit.system import shared_memory, watchdog
from lorainit.system.host_failure import is_host_failure


class ListenerFailed(BaseException):
    """A caller's `on_event` raised an unexpected error, which ends all runs of the process.

    It is not an `Exception`, because handlers of `Exception` in between would take it for an error of one run.
    """


def wrap_listener(on_event: OnEvent) -> OnEvent:
    """`on_event` with its unexpected errors raised as `ListenerFailed`, so that they differ from errors of the run."""

    def listen(event: Event) -> None:
        try:
            on_event(event)
        except LorainitError:
            raise
        except Exception as error:
            raise ListenerFailed from error

    return listen


@contextmanager
def raise_listener_errors() -> Iterator[None]:
    """Turn a wrapped listener's `ListenerFailed` back into the original error."""
    try:
        yield
    except ListenerFailed as failure:
        cause = failure.__cause__
    else:
        return
    assert cause is not None
    raise cause


def to_run_error(error: Exception, *, alone: bool) -> LorainitError:
    """The error that ends the one run in which `error` was raised; the memory that it held is released.

    Args:
        alone: no other run shares this process, so nothing has to be protected from the error.

    Raises:
        Stopped: `error` is one; it stops all runs.
        UnusableDevice, DeviceSilent: the GPU or another process has failed, which ends all runs.
        Exception: the error itself, if it is not a `LorainitError` and the run is alone, or if CUDA cannot be used any
            more.
    """
    if isinstance(error, Stopped | UnusableDevice) or machine_errors.is_kernel_assert(error):
        raise error
    if alone:
        if isinstance(error, LorainitError):
            return error
        raise error
    ours = translate_error(error)
    if isinstance(ours, UnusableDevice | DeviceSilent):
        raise ours from error
    if ours is None:
        traceback.print_exception(error)
        ours = LorainitError("The run failed for a reason that is ours, not yours.")
    release_frames(error)
    return ours


def release_frames(error: BaseException) -> None:
    """Clear the frames that an error went through, because their variables keep large tensors in memory."""
    chain: BaseException | None = error
    while chain is not None:
        traceback.clear_frames(chain.__traceback__)
        chain = chain.__cause__ or chain.__context__
    devices.release_memory()


# --- the machine's failures ----------------------------------------------------------------------


@contextmanager
def translate_errors() -> Iterator[None]:
    """Raise failures of the machine as our own errors, with advice on what the caller can do."""
    try:
        yield
    except LorainitError:
        raise
    except Exception as error:
        if ours := translate_error(error):
            raise ours from error
        raise


def translate_error(error: Exception) -> LorainitError | None:
    """The error as a `LorainitError`; None if it is no known failure."""
    if isinstance(error, LorainitError):
        return error
    found = (_translate_machine_error(one) for one in machine_errors.list_causes(error))
    return next((ours for ours in found if ours), None) or _translate_model_error(error)


def _translate_machine_error(error: BaseException) -> LorainitError | None:
    if devices.is_out_of_memory(error):
        return OutOfMemory(
            "The device ran out of memory. A smaller max_length or batch_size, a lower r, or fewer target modules"
            " helps.",
            param="training.max_length",
        )
    if shared_memory.is_full(error):
        return SharedMemoryFull(shared_memory.FULL)
    if machine_errors.is_full_disk(error):
        return DiskFull(f"No space left to write {getattr(error, 'filename', None) or 'the results'}.")
    if machine_errors.is_failed_device(error):
        said = " ".join(str(error).splitlines()[0].split())[:300]
        return UnusableDevice(f"The GPU failed while the run was using it: {said}")
    if how := machine_errors.find_peer_failure(error):
        return DeviceSilent(watchdog.timeout_failure().message if how == "silent" else watchdog.PEER_GONE)
    if is_host_failure(error):
        return HostFailed(f"The worker's host failed the run: {' '.join(str(error).split())[:300]}")
    return None


def _translate_model_error(error: Exception) -> LorainitError | None:
    text = str(error) if isinstance(error, RuntimeError) else ""
    if "deterministic" in text and "use_deterministic_algorithms" in text:
        return UnsupportedModel(
            "This base model needs a kernel without a deterministic form: set deterministic to false.",
            param="deterministic",
        )
    return None
