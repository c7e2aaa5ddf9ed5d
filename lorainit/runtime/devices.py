"""The device of a run: which one, its number formats and memory, and a description of the machine for the manifest.

Also seeded generators and deterministic kernels, so that a run can be repeated with the same result.
"""

import errno
import gc
import hashlib
import os
import platform
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from lorainit.config.errors import UnsupportedModel, UnusableDevice
from lorainit.config.spec import Choice, Hyperparameters
from lorainit.runtime import settings
from lorainit.system import gpus

PRECISION = "training.precision"
# torch's names for instructions that multiply bf16: x86 with AVX-512 or AMX, and ARM.
_CPU_BF16 = ("avx512_bf16", "amx_bf16", "bf16")
# Texts, in lower case, by which libraries report that memory is used up where torch has no class for it. Triton's "out
# of resource" is not among them, because it means that a kernel is too large, and a smaller batch would not help.
_NO_MEMORY_LEFT = (
    "out of memory",  # CUDA's runtime and driver, NCCL ("Cuda failure 2 'out of memory'"), Triton, bitsandbytes
    "cuda_error_out_of_memory",
    "cudaerrormemoryallocation",
    "status_alloc_failed",  # cuBLAS, cuSOLVER, cuSPARSE, cuDNN 8
    "allocation_failed",  # cuDNN 9
    "status_not_initialized when calling `cublascreate",  # cuBLAS with no room for its workspace
    "status_not_initialized when calling `cublasltcreate",
    "status_not_initialized, when calling `cusolverdncreate",
    "cudnn_status_not_initialized",  # cuDNN with no room for its handle
    "insufficient_resources",  # cuSPARSE
    "std::bad_alloc",  # C++ on the host
    "failed to cuda calloc",  # NCCL
    "failed to cuda malloc",
    "failed to cuda host alloc",
    "can't allocate memory",  # torch on the host
    "cannot allocate memory",  # the system's own words, of mapping a file
    "not enough memory",
)
PACKAGES = ("lorainit", "torch", "transformers", "peft", "safetensors", "tokenizers", "gguf", "bitsandbytes", "numpy")


def pick_device() -> torch.device:
    """The GPU if there is one, else the CPU. An empty CUDA_VISIBLE_DEVICES asks for the CPU.

    Raises:
        UnusableDevice: there is a GPU for this process, but CUDA cannot use it. The CPU is not used instead, because a
            run that should take an hour would then take days.
    """
    if torch.cuda.is_available():
        return torch.device("cuda")
    if why := explain_unusable_gpu():
        raise UnusableDevice(why)
    return torch.device("cpu")


def explain_unusable_gpu() -> str | None:
    """Why this process cannot use the GPUs that it should use; None if it can, or if it should use none."""
    if torch.cuda.is_available():
        return None
    if why := gpus.find_problem():
        return why
    if torch.version.cuda is None or not gpus.list_visible():
        return f"This run needs a GPU, and {gpus.explain_no_gpu() or 'CUDA sees none'}." if gpus.is_needed() else None
    try:
        torch.cuda.init()
        said = "it does not say why"
    except Exception as error:  # torch raises several classes here; the text of any of them is the reason
        said = " ".join(str(error).split())[:300]
    return f"There is an NVIDIA GPU, and CUDA cannot use it: {said}"


def find_failing_gpu() -> str | None:
    """A sentence about the first GPU that does not compute correctly; None if all do, or if there is none."""
    for number in range(torch.cuda.device_count()) if torch.cuda.is_available() else ():
        said = "a product is wrong"
        try:
            ones = torch.ones(256, 256, device=torch.device("cuda", number))
            if bool((ones @ ones == 256).all()):
                continue
        except Exception as error:  # any error counts, because a run would fail with it too
            if is_out_of_memory(error):
                continue  # another process is using the GPU, so it works
            said = " ".join(str(error).split())[:300]
        return f"GPU {number} of those that are visible does not compute: {said}"
    return None


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 numbers in hardware. Emulation does not count, because it saves no time."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in _CPU_BF16)


def resolve_precision(training: Hyperparameters, device: torch.device) -> tuple[Hyperparameters, list[Choice]]:
    """`training` with `precision` "fp32" or "bf16", and a `Choice` if it was "auto".

    Raises:
        UnsupportedModel: bf16 was asked for and the device does not have it.
    """
    name = "GPU" if device.type == "cuda" else "processor"
    if training.precision == "bf16" and not has_bf16(device):
        raise UnsupportedModel(f"This {name} has no bf16: ask for precision fp32 or auto.", param=PRECISION)
    if training.precision != "auto":
        return training, []
    value, reason = _automatic_precision(device)
    choice = Choice(param=PRECISION, value=value, reason=reason)
    return training.model_copy(update={"precision": value}), [choice]


def _automatic_precision(device: torch.device) -> tuple[Literal["fp32", "bf16"], str]:
    if device.type != "cuda":
        return "fp32", "a run without a GPU is exact and the same bit for bit every time"
    if not has_bf16(device):
        return "fp32", "this GPU has no bf16"
    return "bf16", "the GPU is fastest in it, and the base takes half the memory"


def dtype_of(precision: Literal["auto", "fp32", "bf16"]) -> torch.dtype:
    """The base model's number format for a resolved precision."""
    assert precision != "auto"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


@contextmanager
def make_reproducible(seed: int, *, deterministic: bool) -> Iterator[None]:
    """Seed the global generators and use deterministic kernels inside; restore the caller's settings afterwards."""
    before = torch.are_deterministic_algorithms_enabled()
    debugging: Any = torch.utils.deterministic  # a module with properties, which mypy does not see
    fill = debugging.fill_uninitialized_memory
    if deterministic:
        # cuBLAS is deterministic only with a fixed workspace. It reads this when it starts, so it is set before.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        try:
            torch.use_deterministic_algorithms(deterministic)
            # Deterministic mode also fills every new tensor with NaN. That only helps debugging and costs a pass over
            # memory each time, so it is switched off.
            debugging.fill_uninitialized_memory = False
            yield
        finally:
            torch.use_deterministic_algorithms(before)
            debugging.fill_uninitialized_memory = fill


def make_generator(seed: int, name: str) -> torch.Generator:
    """A generator for one module. Its numbers depend on the seed and the name only, not on the order of modules."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host had no memory left, whichever library says so."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY_LEFT)


def release_memory() -> None:
    """Return unused memory to the device, so that other processes and copies of the base can use it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_bytes(device: torch.device, root: Path = Path("/")) -> int | None:
    """Bytes that are still free on a device or, for the CPU, in this process's container; None = unknown.

    Args:
        root: the folder that contains `proc` and `sys`.
    """
    if device.type == "cuda":
        # torch keeps freed memory for itself. The driver counts it as used, so it is added again.
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    free = []
    with suppress(OSError):
        (line,) = [one for one in (root / "proc/meminfo").read_text().splitlines() if one.startswith("MemAvailable")]
        free.append(int(line.split()[1]) * 1024)
    with suppress(OSError, ValueError):  # "max" where there is no limit
        group = root / "sys/fs/cgroup"
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        # The kernel counts cached pages of files as used, for example those of a base's weights. It frees them when
        # memory is needed, so they are added again.
        files = [line for line in (group / "memory.stat").read_text().splitlines() if line.startswith("inactive_file ")]
        free.append(limit - used + sum(int(line.split()[1]) for line in files))
    return min(free, default=None)


_peaks: list[int] = []  # the GPU's peaks so far, kept because `peak_while` resets torch's counter


def peak_while(work: Callable[[], None]) -> int:
    """The most bytes of the GPU that were in use while `work` ran."""
    _peaks.append(torch.cuda.max_memory_allocated())
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated()


def peak_memory_bytes() -> int:
    """The peak so far in bytes: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return max(torch.cuda.max_memory_allocated(), *_peaks, 0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def gpu_name() -> str | None:
    """The GPU's name; None without one, or if CUDA cannot start on it (`find_failing_gpu` then gives the reason)."""
    if not torch.cuda.is_available():
        return None
    try:
        return torch.cuda.get_device_name()
    except RuntimeError:
        return None


def name_and_memory(device: torch.device) -> tuple[str, int]:
    """The device's name and its memory in bytes; 0 for a CPU, because other programs use that memory too."""
    if device.type != "cuda":
        return device.type, 0
    return torch.cuda.get_device_name(), torch.cuda.mem_get_info(device)[1]


def describe_machine() -> dict[str, Any]:
    """The machine and the settings that were chosen for it, for the manifest."""
    return {
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "gpu": gpu_name(),
        "cuda": torch.version.cuda,
        "driver": gpus.driver_version(),
        "settings": settings.values(),
    }


def package_versions() -> dict[str, str | None]:
    """Installed versions of the packages that can change a result."""
    return {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}


@cache  # because a run asks five times, and each answer is read and parsed from a file
def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
