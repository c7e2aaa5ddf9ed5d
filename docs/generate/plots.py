"""docs/pictures/methods: where the start of every initialization lies, from real numbers on one small layer.

The layer is a weight of 48×64 whose singular values fall like 1/i. Its task is to become another weight, on 512 inputs
that vary much in few directions: that gives a gradient, second moments and a preheated adapter without a model. Each
method is called as a run calls it, with r = 4.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from docs.generate.svg import Drawing
from lorainit.config.inits import INITS
from lorainit.config.spec import Lora
from lorainit.init.evidence import Evidence
from lorainit.init.methods import METHODS
from lorainit.model.layers.factors import Factors

OUT, IN, RANK, ROWS = 48, 64, 4, 512
PREHEAT_RANK, PREHEAT_STEPS, PREHEAT_RATE = 16, 100, 0.5
LEVELS = 16  # of a number of four bits
BARS = """
  .size { stroke: #9ca3af; stroke-width: 6; }
  .b { stroke: #1d4ed8; stroke-width: 6; }
  .a { stroke: #c2410c; stroke-width: 6; }
  .axis { stroke: #d1d5db; }
"""


@dataclass(frozen=True)
class Layer:
    """One layer and what a method may see of it. `quantized`: W rounded to four bits, as LoftQ finds it."""

    weight: Tensor
    quantized: Tensor
    evidence: Evidence


def picture(name: str) -> str:
    """The SVG of one initialization."""
    factors, weight, scale = start(name)
    found = _directions(name)
    left, right = _share(factors.B, found.left), _share(factors.A.T, found.right)
    title = f"Where A and B of {INITS[name].facts.title} start"
    drawing = Drawing(title, width=640, height=316, style=BARS)
    drawing.text(20, 26, title, kind="bold")
    drawing.text(20, 44, _sizes(factors, weight, scale))
    panels = (
        (f"Singular values {found.subject}, over the largest", found.sizes, "size"),
        ("B: how much of each left singular direction its columns hold (0 to 1)", left, "b"),
        (f"A: how much of each {found.right_is} its rows hold (0 to 1)", right, "a"),
    )
    for number, (caption, values, kind) in enumerate(panels):
        base = 126 + 86 * number
        drawing.text(20, base - 58, caption if any(values) else f"{caption}: zero at the start")
        drawing.parts.append(f'<path class="axis" d="M20 {base}H620"/>')
        drawing.bars(values, x=20, y=base, step=600 / OUT, height=48, kind=kind)
    drawing.text(620, 312, f"direction 1 to {OUT}, strongest first", anchor="end")
    return drawing.render()


@lru_cache
def start(name: str) -> tuple[Factors, Tensor, float]:
    """The factors, the weight they are for, and the scale s, with the method's recommended settings."""
    kind, small = INITS[name], layer()
    asked = {"init": name, "r": RANK, "quantization": kind.facts.quantization[0]}
    lora, _ = Lora.model_validate(asked).resolve()
    weight = small.quantized if None not in kind.facts.quantization else small.weight
    factors = METHODS[name](
        weight,
        small.evidence,
        rank=RANK,
        scale=lora.scaling,
        config=lora.method,
        generator=torch.Generator().manual_seed(0),
    )
    return factors, weight, lora.scaling


@lru_cache
def layer() -> Layer:
    """The same numbers on every machine, but for rounding."""
    draw = torch.Generator().manual_seed(7)
    weight = _with_spectrum(OUT, IN, power=1.0, draw=draw)
    wanted = weight + 0.3 * _with_spectrum(OUT, IN, power=0.7, draw=draw)
    inputs = torch.randn(ROWS, IN, generator=draw, dtype=torch.float64) @ _with_spectrum(IN, IN, power=0.6, draw=draw)
    moment = inputs.T @ inputs / ROWS
    spread, directions = torch.linalg.eigh(moment)
    evidence = Evidence(
        gradient=((weight - wanted) @ moment).float(),
        second_moment=moment.float(),
        directions=directions.T.flip(0)[: 4 * RANK].float(),
        spread=(ROWS * spread.flip(0)[: 4 * RANK]).sqrt().float(),
        preheated=_preheated(weight - wanted, moment, draw),
        original=weight.float(),
        rows=ROWS,
    )
    return Layer(weight.float(), _in_four_bits(weight).float(), evidence)


def _with_spectrum(m: int, n: int, *, power: float, draw: torch.Generator) -> Tensor:
    """m×n in float64 with random singular directions and the singular values 1/i^power."""
    U = torch.linalg.qr(torch.randn(m, m, generator=draw, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=torch.float64)).Q
    k = min(m, n)
    W: Tensor = U[:, :k] / torch.arange(1.0, k + 1, dtype=torch.float64) ** power @ V[:, :k].T
    return W


def _preheated(error: Tensor, moment: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """A LoRA after some steps of gradient descent on the loss ½·tr(D·C·Dᵀ) with D = error + B·A."""
    A = torch.linalg.qr(torch.randn(IN, PREHEAT_RANK, generator=draw, dtype=torch.float64)).Q.T
    B = torch.zeros(OUT, PREHEAT_RANK, dtype=torch.float64)
    for _ in range(PREHEAT_STEPS):
        G = (error + B @ A) @ moment
        A, B = A - PREHEAT_RATE * B.T @ G, B - PREHEAT_RATE * G @ A.T
    return A.float(), B.float()


def _in_four_bits(weight: Tensor) -> Tensor:
    """Each row rounded to 16 equally spaced numbers; NF4 spaces them otherwise, with an error of the same kind."""
    step = 2 * weight.abs().amax(1, keepdim=True) / (LEVELS - 1)
    return ((weight / step - 0.5).round() + 0.5) * step


@dataclass(frozen=True)
class Directions:
    """What a method looks at, in words, its singular values over the largest, and the directions that A and B are
    compared with, a row each: `left` is k×out, `right` k×in, k = out."""

    subject: str
    sizes: list[float]
    left: Tensor
    right: Tensor
    right_is: str = "right singular direction"


def _directions(name: str) -> Directions:
    small, needs = layer(), INITS[name].facts.needs
    weight, gradient, moment = small.weight.double(), small.evidence.gradient, small.evidence.second_moment
    assert gradient is not None
    assert moment is not None
    if needs in ("gradient", "preheat"):
        return _of("of the gradient", gradient.double())
    if needs == "activation":
        found = _of("of the weight times the inputs' second moment", weight @ moment.double())
        main = torch.linalg.eigh(moment.double()).eigenvectors.T.flip(0)[:OUT]
        return replace(found, right=main, right_is="principal direction of the inputs")
    if None not in INITS[name].facts.quantization:
        return _of("of what four bits lost of the weight", weight - small.quantized.double())
    return _of("of the weight", weight)


def _of(subject: str, matrix: Tensor) -> Directions:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return Directions(subject, (S / S[0]).tolist(), U.T, Vh)


def _share(factor: Tensor, directions: Tensor) -> list[float]:
    """‖Qᵀ·d‖² for each row d of `directions`, Q an orthonormal basis of the factor's columns; 0 if it is zero."""
    U, S, _ = torch.linalg.svd(factor.double(), full_matrices=False)
    basis = U[:, 1e-6 * S[0] < S] if S[0] > 0 else U[:, :0]
    found: list[float] = (directions @ basis).square().sum(1).tolist()
    return found


def _sizes(factors: Factors, weight: Tensor, scale: float) -> str:
    A, B, W = factors.A.double(), factors.B.double(), weight.double()
    product = float(scale * (B @ A).norm() / W.norm())
    return f"r = {RANK},  ‖A‖ = {A.norm():.2f},  ‖B‖ = {B.norm():.2f},  ‖s·B·A‖ / ‖W‖ = {product:.2f}"
