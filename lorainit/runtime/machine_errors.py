"""Recognizes errors that the machine caused: a failed device, an ended process, a full memory or disk, a bad disk.

Such an error is not the job's fault, so the job is tried again elsewhere (docs/decisions/0057, 0058). Code that catches
any error and blames a model or an adapter for it calls `is_machine_failure` first, and raises such an error unchanged.
Errors are recognized by their text, because libraries have no classes for most of these failures.
"""

import errno
import os
import re
from collections.abc import Iterator
from typing import Literal

from torch import distributed

from lorainit.runtime.devices import is_out_of_memory
from lorainit.system import shared_memory
from lorainit.system.host_failure import is_host_failure

# An error is about a GPU if it names one of these. cuSOLVER is left out, because its errors are mostly about matrices
# that have no decomposition.
_SPEAKERS = ("cuda", "cudnn", "nvml", "nccl", "nvidia")
# torch gives CUDA's error number where it counts devices: "Error 802: system not yet initialized".
_NUMBERED = re.compile(r"\berror \d+: ")
_MISSING = "no kernel image is available"
# Texts, in lower case, of errors after which the same work may succeed on another GPU, or here in a new process.
_FAILED = (
    "unknown error",
    "no cuda-capable device",
    "no cuda gpus are available",
    "found no nvidia driver",
    "driver on your system is too old",
    "driver version is insufficient",
    "busy or unavailable",  # "device(s) is/are" since CUDA 11, "devices are" before
    "invalid device ordinal",
    "initialization error",
    "provided ptx was compiled",  # by a newer compiler than the driver's, as is the next
    "device kernel image is invalid",
    "api call is not supported in the installed",
    "os call failed",
    "device < num_gpus",  # torch's check of a GPU that was there when it counted them
    _MISSING,  # torch was not built for this GPU
    "system not yet initialized",
    "unsupported display driver",  # the driver's kernel module and its library differ
    "forward compatibility was attempted",
    "mps client failed",
    "operation not supported on global/shared address space",
    "uncorrectable ecc",
    "uncorrectable nvlink",
    "nvlink error was detected",
    "hardware stack error",
    "hardware error",
    "device not ready",
    "gpu is lost",
    "gpu_is_lost",
    "fallen off the bus",
    "device lost",
    "nvml_success ==",  # torch's allocator asked NVML about a GPU that has disappeared
    # A kernel failed, because of a bug or of bad memory. CUDA cannot be used in this process afterwards.
    "illegal memory access",
    "illegal instruction",
    "illegal address",
    "misaligned address",
    "invalid program counter",
    "launch failure",
    "launch timed out",
    "context is destroyed",
    "cublas_status_execution_failed",
    "cublas_status_internal_error",
    "cudnn_status_execution_failed",
    "cudnn_status_internal_error",
)
# The beginnings of errors that CUDA's runtime, its driver or Triton return from a call. Such an error counts as the
# machine's unless its text is about the call itself (`_OF_A_CALL`). So an unknown text leads to another attempt, and is
# not blamed on the job.
_ANSWERS = ("cuda error: ", "cuda driver error: ", "triton error [cuda]: ")
_OF_A_CALL = (
    "invalid",
    "not supported",
    "not_supported",
    "not permitted",
    "unrecognized",
    "too many",
    "too large",
    "captur",  # "capture" and "capturing" of CUDA graphs
    "already",
    "peer access",
    "named symbol",
)
_ASSERT = "device-side assert"  # a kernel checked its input and refused it, for example an index out of range
_FULL_DISK = ("No space left on device", "Disk quota exceeded")
# Texts of gloo, NCCL and torch's stores, in lower case: another process does not answer (_SILENT) or has ended (_GONE).
_SILENT = (
    "wait timeout",
    "timeout waiting for key",
    "timed out waiting",
    "timed out after",
    "has timed out",
    "socket timeout",
    "operation timed out",
    "connection timed out",
    "operation timeout",  # NCCL's watchdog: "collective operation timeout"
    "application timeout",
)
_GONE = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "connection abort",
    "connection was likely closed",
    "connectfullmesh failed",
    "broken pipe",
    "socket closed",
    "read error [",
    "write error [",
    "sendbytes failed",
    "recvbytes failed",
    "remote process exited",
    # NCCL's error classes for failures between processes, whatever text follows. Check first whether memory ran out,
    # because NCCL may report that under the same classes.
    "ncclinternalerror",
    "ncclsystemerror",
    "ncclremoteerror",
    "communicator was aborted",
    "remote peer",
    "no route to host",
    "network is unreachable",
)


def is_machine_failure(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, is no fault of the model, the data or the adapter.

    A kernel's assert counts too, although a run's numbers caused it, because CUDA then fails for all runs of the
    process.
    """
    kinds = (
        is_out_of_memory,
        is_full_disk,
        shared_memory.is_full,
        is_failed_device,
        is_kernel_assert,
        find_peer_failure,
        is_host_failure,
    )
    return any(kind(one) for one in list_causes(error) for kind in kinds)


def list_causes(error: BaseException) -> Iterator[BaseException]:
    """The error and those that it was raised from, because libraries wrap errors while they load a model."""
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__


def is_full_disk(error: BaseException) -> bool:
    """Whether a file could not be written because the disk is full. Check `shared_memory.is_full` first."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return isinstance(error, Exception) and any(
        words in str(error) for words in _FULL_DISK
    )  # safetensors has its own class


def is_failed_device(error: BaseException) -> bool:
    """Whether the GPU or its driver has failed, and not the run. Check `is_out_of_memory` first."""
    said = str(error).lower() if isinstance(error, RuntimeError) else ""
    is_cuda = any(who in said for who in _SPEAKERS) or _NUMBERED.search(said)
    if is_cuda and any(words in said for words in _FAILED):
        return True
    if not said.startswith(_ANSWERS) or is_out_of_memory(error) or is_kernel_assert(error):
        return False
    return not any(words in said.splitlines()[0] for words in _OF_A_CALL)


def is_missing_kernel(error: BaseException) -> bool:
    """Whether one kernel was not built for this GPU. The process can go on, because other kernels may work."""
    return is_failed_device(error) and _MISSING in str(error).lower()


def is_kernel_assert(error: BaseException) -> bool:
    """Whether a kernel refused its input. The run caused it, but CUDA cannot be used in this process afterwards."""
    return isinstance(error, RuntimeError) and _ASSERT in str(error).lower()


def find_peer_failure(error: BaseException) -> Literal["silent", "gone"] | None:
    """Whether an error means that another process of this run does not answer ("silent") or has ended ("gone").

    Always None in a run of one process, because there the same texts come from other connections.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not isinstance(error, RuntimeError):
        return None
    said = str(error).lower()
    if any(words in said for words in _SILENT):
        return "silent"
    is_gone = isinstance(error, distributed.DistNetworkError | distributed.DistStoreError)
    return "gone" if is_gone or any(words in said for words in _GONE) else None
