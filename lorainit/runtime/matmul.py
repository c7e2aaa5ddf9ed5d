"""Chooses how this process multiplies matrices: threads, the library for float32, reduced precision on a GPU.

A faster library is taken only where its products are as exact as float32 products are, so that the choice changes
speed and not results.
"""

import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from lorainit.runtime.settings import Setting

# Relative error, in the Frobenius norm, against float64: float32 sums of 576 to 4096 products have 2.5e-7 (MKL)
# to 5.7e-7 (oneDNN); inputs rounded to bf16 give 2e-3, to TF32 3e-4.
EXACT = 1e-6
_INNER = (576, 1536, 4096)
_SHAPE = (256, 576, 1536)  # tokens, in, out of the product that is timed
_REPEATS = 5


def tune_matmul(*, cpus: int, vendor: str | None) -> list[Setting]:
    """Choose and set; see each function.

    Args:
        cpus: cores this process may keep busy.
        vendor: of the processor; None = not known.
    """
    chosen = [use_threads(cpus)]
    if has_gpu():
        return [*chosen, forbid_tf32()]
    return [*chosen, choose_fp32_library(measure_onednn, vendor=vendor)]


def has_gpu() -> bool:
    """Whether runs of this process go to a GPU."""
    return torch.cuda.is_available()


def use_threads(cpus: int) -> Setting:
    """Use as many threads as this process has cores; `OMP_NUM_THREADS` in the environment takes precedence.

    torch counts the machine's physical cores and ignores a cgroup's quota. With more threads than the quota allows, all
    of them are stopped for the rest of each period.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return Setting("threads", str(torch.get_num_threads()), "OMP_NUM_THREADS is set in the environment")
    threads = min(torch.get_num_threads(), cpus)
    torch.set_num_threads(threads)
    return Setting("threads", str(threads), f"{cpus} cores may be used, by affinity and CPU quota")


# --- fp32 on a CPU -------------------------------------------------------------------------------


class OneDnnMeasurement(NamedTuple):
    """Of oneDNN on this machine: its largest relative error, and how many times as fast as the default it was now."""

    error: float
    ratio: float


def measure_onednn() -> OneDnnMeasurement:
    """Compare both on fixed random matrices; leaves the default on. Takes about 0.1 s."""
    try:
        _use_onednn(on=True)
        error = max(_relative_error(inner) for inner in _INNER)
        seconds = {True: float("inf"), False: float("inf")}
        tokens, n, out = _SHAPE
        x, W = _random_matrix(tokens, n), _random_matrix(out, n)
        for _ in range(_REPEATS):  # alternating, and the best of each: what else runs here slows single ones
            for on in seconds:
                _use_onednn(on=on)
                seconds[on] = min(seconds[on], _time_product(x, W))
    finally:
        _use_onednn(on=False)
    return OneDnnMeasurement(error, seconds[False] / seconds[True])


def choose_fp32_library(measured: Callable[[], OneDnnMeasurement], *, vendor: str | None) -> Setting:
    """Let oneDNN multiply float32 matrices where MKL is slow and oneDNN as exact as float32 is.

    MKL takes slow paths on processors that are not Intel's: oneDNN is about twice as fast on an AMD EPYC (Zen 5).
    torch hands fp32 products to oneDNN when it is told that bf16 would be precise enough; there is no switch for the
    library alone. What oneDNN makes of that permission depends on the processor: float32 all the same, or, with AMX,
    bf16. So the error is measured first.

    Vendor and error decide, and the time does not: on a busy machine it came out either way, and a resumed run
    continues bit by bit only where the same machine chooses the same again.

    Args:
        vendor: of the processor, as Linux calls it; None = not known.
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
    # The older of torch's two switches: setting `torch.backends.mkldnn.matmul.fp32_precision` makes
    # `torch.get_float32_matmul_precision` raise wherever a library asks (2.13). "medium" permits TF32 on GPUs too, and
    # is set where there is none.
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
    """Keep float32 on a GPU: speed is what bf16 is for, and fp32 is asked for to compare initializations.

    TF32 rounds factors to 10 bits of mantissa, and what an adapter adds in its first steps is smaller than that. Where
    cuBLAS splits a sum of bf16 products, the parts are added in float32 too. Has not run: no GPU was at hand.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if os.environ.get("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE") == "1":
        return Setting("GPU products", "TF32 for fp32", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE is set in the environment")
    torch.set_float32_matmul_precision("highest")
    return Setting("GPU products", "float32 stays float32", "TF32 would lose what an adapter adds in its first steps")
