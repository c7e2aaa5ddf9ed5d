"""Where a run happens: device, number format, randomness, memory, and a description for the record."""

import hashlib
import os
import platform
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch

from lorainit import machine
from lorainit.errors import UnsupportedModel

PACKAGES = ("lorainit", "torch", "transformers", "peft", "safetensors", "tokenizers", "gguf", "bitsandbytes", "numpy")


def pick_device() -> torch.device:
    """The accelerator if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(precision: Literal["auto", "fp32", "bf16"], device: torch.device) -> torch.dtype:
    """The base model's number format. "auto": bf16 on a GPU that has it, else fp32.

    Raises:
        UnsupportedModel: bf16 was asked for and the GPU does not have it.
    """
    able = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" and not able:
        raise UnsupportedModel("This GPU has no bf16: ask for precision fp32 or auto.", param="precision")
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" and able else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def precision_name(dtype: torch.dtype) -> str:
    """`fp32` or `bf16`, as in the spec."""
    return "bf16" if dtype == torch.bfloat16 else "fp32"


@contextmanager
def reproducible(seed: int, *, deterministic: bool) -> Iterator[None]:
    """Seeded global generators and deterministic kernels inside; the caller's settings afterwards."""
    before = torch.are_deterministic_algorithms_enabled()
    debugging: Any = torch.utils.deterministic  # a module with properties, which mypy does not see
    fill = debugging.fill_uninitialized_memory
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's BLAS starts
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        try:
            torch.use_deterministic_algorithms(deterministic)
            # Filling every new tensor with NaN is a debugging aid that costs a pass over memory.
            debugging.fill_uninitialized_memory = False
            yield
        finally:
            torch.use_deterministic_algorithms(before)
            debugging.fill_uninitialized_memory = fill


def generator_for(seed: int, name: str) -> torch.Generator:
    """A module's own stream of random numbers, whatever the other modules draw before it."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def peak_memory_bytes() -> int:
    """Peak so far: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def gpu_name() -> str | None:
    """The GPU's name, None without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def description() -> dict[str, Any]:
    """The machine and what was chosen for it, for the manifest."""
    return {
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "gpu": gpu_name(),
        "cuda": torch.version.cuda,
        "settings": machine.settings(),
    }


def versions() -> dict[str, str | None]:
    """Installed versions of what shapes a result."""
    return {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
