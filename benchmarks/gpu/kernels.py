"""What the engine's products and its attention are on this device, beside the same in float64."""

import subprocess
import time
from itertools import pairwise, product

import torch
from torch import Tensor, nn

from benchmarks.gpu.day import Day, held
from lorainit.model.forward import attention as ours
from lorainit.model.layers.factors import Factors
from lorainit.model.layers.layer import LoRALinear
from lorainit.runtime import devices

LENGTHS = (70, 5, 125, 300)
HEADS = {"all heads alike": (4, 4), "grouped heads": (8, 2)}
SIZES = (64, 96, 128, 20, 80, 192, 208, 256, 512)
WINDOWS = (None, 64)
# Relative errors of outputs and gradients that are the format's own rounding.
EXACT = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
QUERY = "name,driver_version,memory.total,clocks.max.sm,power.limit"


def machine(day: Day) -> None:
    """Names and versions, and what a large copy and a large product reach here."""
    facts = devices.describe_machine()
    packages = ", ".join(f"{name} {version}" for name, version in devices.package_versions().items() if version)
    day.say(f"- {facts['gpu'] or 'no GPU'}, CUDA of torch {facts['cuda']}, {facts['cpus']} processor cores")
    day.say(f"- {packages}")
    if not day.has_gpu:
        return
    asked = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    day.say(f"- {subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()} ({QUERY})")
    day.attempt("copy on the device, bytes read and written", lambda: f"{_copy(day):.2f} TB/s")
    day.attempt("product of two 8192×8192 in bf16", lambda: f"{_product(day) / 1e12:.0f} TFLOP/s")


def _copy(day: Day) -> float:
    source = torch.randn(1 << 30, device=day.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(day, lambda: target.copy_(source)) / 1e12


def _product(day: Day, n: int = 8192) -> float:
    x, W = (torch.randn(n, n, device=day.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / _seconds(day, lambda: x @ W)


def _seconds(day: Day, work: object, repeats: int = 10) -> float:
    found = []
    for _ in range(repeats + 2):
        day.wait()
        started = time.perf_counter()
        work()  # type: ignore[operator]
        day.wait()
        found.append(time.perf_counter() - started)
    return sorted(found[2:])[repeats // 2]


# --- attention -----------------------------------------------------------------------------------


def attention(day: Day) -> None:
    """Packed rows by our attention: outputs and all gradients, beside explicit attention row by row in float64."""
    sizes = SIZES[:2] if day.tiny else SIZES
    for dtype, size, (kind, heads), window in product(EXACT, sizes, HEADS.items(), WINDOWS):
        shown = f"a window of {window}" if window else "no window"
        name = f"{str(dtype).removeprefix('torch.')}, head size {size}, {kind}, {shown}"
        day.attempt(name, lambda d=dtype, s=size, h=heads, w=window: _attention_error(day, d, s, h, w))


def _attention_error(day: Day, dtype: torch.dtype, size: int, heads: tuple[int, int], window: int | None) -> str:
    torch.manual_seed(0)
    total, (many, few) = sum(LENGTHS), heads
    q, k, v = (torch.randn(1, h, total, size, device=day.device, dtype=dtype) for h in (many, few, few))
    grad = torch.randn(1, total, many, size, device=day.device, dtype=dtype)
    ends = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(day.device)
    given = [t.clone().requires_grad_() for t in (q, k, v)]
    module = nn.Module()
    y, _ = ours.attend(module, *given, None, sliding_window=window, cu_seq_lens_q=ends, max_length_q=max(LENGTHS))
    y.backward(grad)
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    true = _explicit(*exact, ends.tolist(), window)  # type: ignore[call-arg]
    true.backward(grad.double())
    pairs = [(y, true), *((a.grad, b.grad) for a, b in zip(given, exact, strict=True))]
    errors = [float((a.double() - b).detach().norm() / b.detach().norm()) for a, b in pairs]
    worst = max(errors)
    return held(worst <= EXACT[dtype], f"at most {worst:.1e} off (output {errors[0]:.1e})")


def _explicit(q: Tensor, k: Tensor, v: Tensor, ends: list[int], window: int | None) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    found = []
    for start, stop in pairwise(ends):
        Q, K, V = (t[:, :, start:stop] for t in (q, k, v))
        place = torch.arange(stop - start, device=q.device)
        distance = place[:, None] - place
        hidden = (distance < 0) | (distance >= (window or stop))
        scores = (Q @ K.mT * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf)
        found.append(scores.softmax(-1) @ V)
    return torch.cat(found, 2).transpose(1, 2)


# --- what a product keeps of a small branch -----------------------------------------------------------


def dead_zone(day: Day) -> None:
    """How much of s·B·A·x, a fifth of a bf16 step of W·x, survives the sum (docs/precision.md)."""
    shapes = [(64, 32, 48)] if day.tiny else [(4096, 1024, 1024), (512, 4096, 14336), (40, 4096, 4096), (33, 576, 576)]
    for tokens, n, out in shapes:
        day.attempt(f"{tokens} tokens, {n} to {out}", lambda t=tokens, n=n, o=out: _kept(day, t, n, o))


@torch.no_grad()
def _kept(day: Day, tokens: int, n: int, out: int) -> str:
    torch.manual_seed(0)
    base = nn.Linear(n, out, bias=False, device=day.device, dtype=torch.bfloat16)
    x = torch.randn(1, tokens, n, device=day.device, dtype=torch.bfloat16)
    A, B = torch.randn(16, n, device=day.device) * n**-0.5, torch.randn(out, 16, device=day.device) * 1e-4
    layer = LoRALinear(base, Factors(A=A, B=B), scale=1.0, subtract=False)
    Wx = x.double() @ base.weight.double().T
    exact = x.double() @ A.double().T @ B.double().T
    twice = base(x) + (x @ A.bfloat16().T @ B.bfloat16().T)
    share = {}
    for name, y in (("ours", layer(x)), ("rounded twice", twice)):
        share[name] = float(((y.double() - Wx) * exact).sum() / exact.square().sum())
    text = f"{share['ours']:.3f} of it (rounded twice: {share['rounded twice']:.3f})"
    return held(abs(share["ours"] - 1) < 0.1, text)
