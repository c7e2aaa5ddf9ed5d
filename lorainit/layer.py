"""The adapted layer: a frozen linear map plus the trained low-rank branch, in difference form, or DoRA's.

The base weight is never touched, so a disabled adapter is the base model bit for bit, and several
adapters could share one base. Knows nothing of methods, training or files.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from transformers.pytorch_utils import Conv1D

from lorainit.methods import Factors
from lorainit.quantize import dequantized, is_quantized


class LoRALinear(nn.Module):
    """y = base(x) + s·(B·A - B0·A0)·x around a frozen `nn.Linear` or transformers `Conv1D`.

    `A` (r×in) and `B` (out×r) are float32 parameters. With `subtract` the starting factors are kept
    as float32 buffers `A0`, `B0`; both branches are then one product of rank 2r. The sum is formed
    in float32 and rounded once to the base's dtype. A rank of 0 is a layer without an adapter: it has
    empty factors, changes nothing and is not exported.

    With `dora` the weight is m ⊙ (W + s·B·A)/‖W + s·B·A‖ row by row (DoRA, Liu et al., arXiv 2402.09353).
    The norms carry no gradient (section 4.3). `magnitude` is m: a float32 parameter (out) that starts at
    those norms, so that training starts from W + s·B·A itself. A row of zeros has no direction: the
    caller refuses such a W.
    """

    A0: Tensor | None
    B0: Tensor | None
    magnitude: nn.Parameter | None

    def __init__(
        self,
        base: nn.Module,
        factors: Factors,
        *,
        scale: float,
        subtract: bool,
        dropout: float = 0.0,
        dora: bool = False,
    ) -> None:
        super().__init__()
        if subtract and dropout:
            raise ValueError("a dropped branch would no longer cancel the offset")
        if subtract and dora:
            raise ValueError("magnitudes of W + s·B·A say nothing about W + s·(B·A - B0·A0)")
        self.base = base
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        self.enabled = True
        # Own copies: what is trained, what is subtracted and what the method returned never alias.
        self.A = nn.Parameter(factors.A.detach().clone())
        self.B = nn.Parameter(factors.B.detach().clone())
        self.register_buffer("A0", factors.A.detach().clone() if subtract else None)
        self.register_buffer("B0", factors.B.detach().clone() if subtract else None)
        self.register_parameter("magnitude", None)
        if dora and len(factors.A):
            self.magnitude = nn.Parameter(self._row_norms())

    def trained(self) -> dict[str, nn.Parameter]:
        """What training moves, by name: `A`, `B` and, with DoRA, `magnitude`."""
        return dict(self.named_parameters(recurse=False))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out) in the base's dtype."""
        y: Tensor = self.base(x)
        if not self.enabled:
            return y
        A: Tensor = self.A
        B: Tensor = self.B
        if self.A0 is not None and self.B0 is not None:
            A, B = torch.cat([A, self.A0]), torch.cat([B, -self.B0], dim=1)
        if self.magnitude is not None:
            return self._dora(x, y, self.magnitude)
        h = F.linear(self.dropout(x).to(A.dtype), A)
        # The scale goes into the small factor: on the product it would be one more pass over the output.
        return (y + F.linear(h, self.scale * B)).to(y.dtype)

    def _dora(self, x: Tensor, y: Tensor, magnitude: Tensor) -> Tensor:
        """y + (g - 1)·W·x + g·s·B·A·x with g = m/‖W + s·B·A‖, which at the start is 1 and adds nothing to y.

        With dropout W sees the dropped x in the second term too, as in PEFT: m scales what is dropped.
        """
        dropped = self.dropout(x)
        Wx = self.base(dropped) if self.dropout.training and self.dropout.p else y
        Wx = Wx.to(magnitude.dtype)
        bias = self.base.bias
        if isinstance(bias, Tensor):
            Wx = Wx - bias
        g = magnitude / self._row_norms()
        h = F.linear(dropped.to(magnitude.dtype), self.A)
        update = torch.addcmul(F.linear(h, (self.scale * g)[:, None] * self.B), g - 1, Wx)
        return (y + update).to(y.dtype)

    @torch.no_grad()
    def _row_norms(self) -> Tensor:
        """‖W + s·B·A‖ of each row, float32 (out).

        From the matrix itself, one layer's temporary: expanding the square instead needs W·Aᵀ, which costs
        the same time (16 ranks: 5 % of a forward pass of 512 tokens) and cancels where a row shrinks.
        """
        adapted_weight = (self.scale * self.B @ self.A).add_(weight_of(self.base))
        norms: Tensor = torch.linalg.vector_norm(adapted_weight, dim=1)
        return norms


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear module as out×in: transformers' `Conv1D` stores in×out, an NF4 layer four bits of each."""
    if is_quantized(module):
        return dequantized(module)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(module, Conv1D) else weight


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear module, whatever form its weight has."""
    names = ("nf", "nx") if isinstance(module, Conv1D) else ("out_features", "in_features")
    out, n = (getattr(module, name) for name in names)
    return out, n


def was_conv1d(module: nn.Module) -> bool:
    """Whether a linear module is a `Conv1D` in the base model's own files: an NF4 layer remembers what it replaced."""
    return issubclass(getattr(module, "source_cls", type(module)), Conv1D)


def adapted(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers of a model by the base's module names, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def attach(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put an adapted layer in the place of the module it wraps, or that module back."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


@contextmanager
def borrowed(model: nn.Module, layers: dict[str, LoRALinear]) -> Iterator[None]:
    """The model with these layers in the places of the modules they wrap, for as long as the context lasts."""
    try:
        for name, layer in layers.items():
            attach(model, name, layer)
        yield
    finally:
        for name, layer in layers.items():
            attach(model, name, layer.base)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base model itself, for as long as the context lasts."""
    layers = list(adapted(model).values())
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
