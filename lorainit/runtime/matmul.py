"""Chooses how this process multiplies matrices: threads, the library for float32, reduced precision on a GPU.

A faster library is used only if its products are as exact as float32 products should be, so that the choice changes
the speed and not the quality of results.
"""

import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from lorainit.runtime.settings import Setting

# Largest relative error against float64, in the Frobenius norm, that still counts as float32. Measured: float32 sums of
# 576 to 4096 products have 2.5e-7 (MKL) to 5.7e-7 (oneDNN), inputs rounded to bf16 give 2e-3, to TF32 3e-4. So 1e-6
# lies clearly between the two groups.
EXACT = 1e-6
_INNER = (576, 1536, 4096)
_SHAPE = (256, 576, 1536)  # tokens, in, out of the product that is timed
_REPEATS = 5


def tune_matmul(*, cpus: int, vendor: str | None) -> list[Setting]:
    """Choose the settings and set them; each function below gives its reasons.

    Args:
        cpus: how many cores this process may use.
        vendor: the processor's vendor; None = unknown.
    """
    chosen = [use_threads(cpus)]
    if has_gpu():
        return [*chosen, forbid_tf32()]
    return [*chosen, choose_fp32_library(measure_onednn, vendor=vendor)]


def has_gpu() -> bool:
    """Whether runs of this process use a GPU."""
    return torch.cuda.is_available()


def use_threads(cpus: int) -> Setting:
    """Use as many threads as this process has cores; `OMP_NUM_THREADS` in the environment takes precedence.

    torch itself counts the machine's physical cores and ignores a cgroup's quota. That is too many in a container,
    because the kernel then stops all threads for the rest of each quota period.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return Setting("threads", str(torch.get_num_threads()), "OMP_NUM_THREADS is set in the environment")
    threads = min(torch.get_num_threads(), cpus)
    torch.set_num_threads(threads)
    return Setting("threads", str(threads), f"{cpus} cores may be used, by affinity and CPU quota")


# --- fp32 on a CPU -------------------------------------------------------------------------------


class OneDnnMeasurement(NamedTuple):
    """oneDNN on this machine: its largest relative error, and how many times as fast as the default it was just now."""

    error: float
    ratio: float


def measure_onednn() -> OneDnnMeasurement:
    """Compare oneDNN with the default on fixed random matrices, in about 0.1 s; the default is on afterwards."""
    try:
        _use_onednn(on=True)
        error = max(_relative_error(inner) for inner in _INNER)
        seconds = {True: float("inf"), False: float("inf")}
        tokens, n, out = _SHAPE
        x, W = _random_matrix(tokens, n), _random_matrix(out, n)
        for _ in range(_REPEATS):  # alternating, and the best time of each, because other programs slow single products
            for on in seconds:
                _use_onednn(on=on)
                seconds[on] = min(seconds[on], _time_product(x, W))
    finally:
        _use_onednn(on=False)
    return OneDnnMeasurement(error, seconds[False] / seconds[True])


def choose_fp32_library(measured: Callable[[], OneDnnMeasurement], *, vendor: str | None) -> Setting:
    """Let oneDNN multiply float32 matrices if MKL is slow here and oneDNN is as exact as float32 should be.

    MKL uses slow code on processors that are not Intel's: oneDNN is about twice as fast on an AMD EPYC (Zen 5). torch
    has no switch for the library alone. It uses oneDNN for fp32 products once it is told that bf16 would be precise
    enough. Depending on the processor, oneDNN then still computes in float32, or, with AMX, really in bf16. Therefore
    the error is measured first.

    The vendor and the error decide, and the measured time does not, because on a busy machine it came out either way.
    A resumed run continues bit by bit only if the same machine makes the same choice again.

    Args:
        measured: measures oneDNN; called only if the vendor does not decide already.
        vendor: the processor's vendor, as Linux names it; None = unknown.
    """
    name = "fp32 products"
    backends: Any = torch.backends  # whose functions have no annotations
    if not backends.mkldnn.is_available() or not backends.mkl.is_available():
        return Setting(name, "default", "this torch has no two libraries to choose from")
    if vendor in (None, "GenuineIntel"):
        return Setting(name, "default", "MKL is made for this processor" if vendor else "the processor is not known")
    error, ratio = found = measured()
    if not error <= EXACT:
        return Setting(name, "default", f"oneDNN would round: relative error {error:.1e}", found._asdict())
    _use_onednn(on=True)
    why = f"{ratio:.1f} times as fast as MKL just now, and as exact: relative error {error:.1e}"
    return Setting(name, "oneDNN", why, found._asdict())


def _use_onednn(*, on: bool) -> None:
    # This is the older of torch's two switches. The newer one, `torch.backends.mkldnn.matmul.fp32_precision`, is not
    # used because `torch.get_float32_matmul_precision` then raises in every library that calls it (torch 2.13).
    # "medium" would allow TF32 on GPUs too, but it is set only on machines without one.
    torch.set_float32_matmul_precision("medium" if on else "highest")


def _relative_error(inner: int) -> float:
    x, W = _random_matrix(128, inner), _random_matrix(128, inner)
    exact = x.double() @ W.double().T
    return float(torch.linalg.vector_norm(F.linear(x, W) - exact) / torch.linalg.vector_norm(exact))


def _random_matrix(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))


def _time_product(x: Tensor, W: Tensor) -> float:
    started = time.perf_counter()
    F.linear(x, W)
    return time.perf_counter() - started


# --- a GPU ---------------------------------------------------------------------------------------


def forbid_tf32() -> Setting:
    """Keep float32 exact on a GPU, because a user who asks for fp32 wants to compare initializations, not speed.

    TF32 rounds inputs to 10 bits of mantissa, and the update of an adapter in its first steps is smaller than that
    rounding. bf16 products are also summed in float32 throughout: cuBLAS may otherwise add partial sums in bf16.
    Not tried on a real GPU yet.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if os.environ.get("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE") == "1":
        return Setting("GPU products", "TF32 for fp32", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE is set in the environment")
    torch.set_float32_matmul_precision("highest")
    return Setting("GPU products", "float32 stays float32", "TF32 would lose what an adapter adds in its first steps")
