"""The adapted layer: a frozen linear map and a trained low-rank branch, in plain form, in difference form or as DoRA.

The base weight is never changed. Therefore a disabled adapter gives the base model bit for bit, and several adapters
can share one base.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from lorainit.model.layers.factors import Factors
from lorainit.model.layers.low_rank import Slot, apply_low_rank
from lorainit.model.layers.weight import weight_of


class LoRALinear(nn.Module):
    """y = base(x) + s·(B·A - B0·A0)·x around a frozen `nn.Linear` or transformers `Conv1D`.

    `A` (r×in) and `B` (out×r) are float32 parameters. With `subtract` the starting factors are kept
    as float32 buffers `A0`, `B0`. `low_rank` explains how the sum is computed. A layer of rank 0 has empty
    factors: it changes nothing and is not exported.

    With `dora` the weight is m ⊙ (W + s·B·A)/‖W + s·B·A‖ row by row (DoRA, Liu et al., arXiv 2402.09353).
    The norms carry no gradient (section 4.3). `magnitude` is m: a float32 parameter (out) that starts at
    those norms, so that training starts from W + s·B·A itself. The caller must refuse a W with a row of zeros,
    because its norm would be a divisor.
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
        self.dropout = Dropout(dropout)
        self.enabled = True
        # Copies, because training changes A and B in place, and neither the start nor the method's result may change.
        self.A = nn.Parameter(factors.A.detach().clone())
        self.B = nn.Parameter(factors.B.detach().clone())
        self.register_buffer("A0", factors.A.detach().clone() if subtract else None)
        self.register_buffer("B0", factors.B.detach().clone() if subtract else None)
        self.register_parameter("magnitude", None)
        if dora and len(factors.A):
            self.magnitude = nn.Parameter(self._row_norms())

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name: `A`, `B` and, with DoRA, `magnitude`."""
        return dict(self.named_parameters(recurse=False))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out) in the base's dtype."""
        if not self.enabled or not len(self.A):
            y: Tensor = self.base(x)
            return y
        if self.magnitude is not None:
            return self._dora(x, self.magnitude)
        return apply_low_rank(x, self.base, [self.make_slot(0, x.numel() // x.shape[-1], like=x)])

    def make_slot(self, start: int, stop: int, *, like: Tensor) -> Slot:
        """This adapter's factors for rows `start` to `stop` of a flattened input like `like`, with a dropout mask."""
        mask = self.dropout.make_mask((stop - start, like.shape[-1]), like=like)
        return Slot(start, stop, self.A, self.B, self.A0, self.B0, self.scale, mask)

    def _dora(self, x: Tensor, magnitude: Tensor) -> Tensor:
        """y + (g - 1)·W·x + g·s·B·A·x with g = m/‖W + s·B·A‖, which at the start is 1 and adds nothing to y = W·x.

        With dropout the second term uses the masked x too, as in PEFT.
        """
        y: Tensor = self.base(x)
        mask = self.dropout.make_mask(x.shape, like=x)
        dropped = x if mask is None else x * mask
        Wx = y if mask is None else self.base(dropped)
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

        Computed from the whole matrix, a temporary of one layer's size. Expanding the square instead needs W·Aᵀ, which
        takes as long (rank 16: 5 % of a forward pass of 512 tokens), and it loses digits if a row shrinks.
        """
        adapted_weight = (self.scale * self.B @ self.A).add_(weight_of(self.base))
        norms: Tensor = torch.linalg.vector_norm(adapted_weight, dim=1)
        return norms


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers of a model by the base's module names, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def attach(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Replace the module of this name: by the adapted layer that wraps it, or by the original module again."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


class Dropout(nn.Module):
    """Dropout whose mask depends on a key only, so that a pass that is repeated drops the same numbers.

    Off while `key` is None. Training sets a key for each layer and pass.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.key: str | None = None

    def make_mask(self, shape: Sequence[int], *, like: Tensor) -> Tensor | None:
        """0 with probability p, else 1/(1 - p), in the dtype and on the device of `like`; None when off."""
        if self.key is None or not self.p:
            return None
        digest = hashlib.sha256(self.key.encode()).digest()
        generator = torch.Generator(like.device).manual_seed(int.from_bytes(digest[:7], "big"))
        kept = torch.rand(tuple(shape), generator=generator, device=like.device) >= self.p
        return kept.to(like.dtype).div_(1 - self.p)


def detach(model: nn.Module) -> dict[str, "LoRALinear"]:
    """Remove the adapted layers from the model and return them by name."""
    layers = adapted_layers(model)
    for name, layer in layers.items():
        attach(model, name, layer.base)
    return layers


@contextmanager
def attach_temporarily(model: nn.Module, layers: dict[str, LoRALinear]) -> Iterator[None]:
    """Attach these layers to the model while the context lasts."""
    try:
        for name, layer in layers.items():
            attach(model, name, layer)
        yield
    finally:
        for name, layer in layers.items():
            attach(model, name, layer.base)


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Make the model compute as the base model while the context lasts."""
    layers = list(adapted_layers(model).values())
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
