"""The adapted layer: a frozen linear map plus the trained low-rank branch, in difference form, or DoRA's.

The base weight is never touched, so a disabled adapter is the base model bit for bit, and several
adapters could share one base. Knows nothing of methods, training or files.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from lorainit.model.layers.factors import Factors
from lorainit.model.layers.low_rank import Slot, low_rank
from lorainit.model.layers.weight import weight_of


class LoRALinear(nn.Module):
    """y = base(x) + s·(B·A - B0·A0)·x around a frozen `nn.Linear` or transformers `Conv1D`.

    `A` (r×in) and `B` (out×r) are float32 parameters. With `subtract` the starting factors are kept
    as float32 buffers `A0`, `B0`. See `low_rank` for how the sum is formed. A rank of 0 is a layer
    without an adapter: it has empty factors, changes nothing and is not exported.

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
        self.dropout = Dropout(dropout)
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
        if not self.enabled or not len(self.A):
            y: Tensor = self.base(x)
            return y
        if self.magnitude is not None:
            return self._dora(x, self.magnitude)
        return low_rank(x, self.base, [self.slot(0, x.numel() // x.shape[-1], like=x)])

    def slot(self, start: int, stop: int, *, like: Tensor) -> Slot:
        """This adapter on some rows of a flattened input."""
        mask = self.dropout.mask((stop - start, like.shape[-1]), like=like)
        return Slot(start, stop, self.A, self.B, self.A0, self.B0, self.scale, mask)

    def _dora(self, x: Tensor, magnitude: Tensor) -> Tensor:
        """y + (g - 1)·W·x + g·s·B·A·x with g = m/‖W + s·B·A‖, which at the start is 1 and adds nothing to y = W·x.

        With dropout W sees the dropped x in the second term too, as in PEFT: m scales what is dropped.
        """
        y: Tensor = self.base(x)
        mask = self.dropout.mask(x.shape, like=x)
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

        From the matrix itself, one layer's temporary: expanding the square instead needs W·Aᵀ, which costs
        the same time (16 ranks: 5 % of a forward pass of 512 tokens) and cancels where a row shrinks.
        """
        adapted_weight = (self.scale * self.B @ self.A).add_(weight_of(self.base))
        norms: Tensor = torch.linalg.vector_norm(adapted_weight, dim=1)
        return norms


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers of a model by the base's module names, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def attach(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put an adapted layer in the place of the module it wraps, or that module back."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


class Dropout(nn.Module):
    """Masks that are a function of a key and nothing else, so a pass drawn again drops the same.

    Off while `key` is None; training sets it for each pass of each layer.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.key: str | None = None

    def mask(self, shape: Sequence[int], *, like: Tensor) -> Tensor | None:
        """0 with probability p, else 1/(1 - p), in the dtype and on the device of `like`; None when off."""
        if self.key is None or not self.p:
            return None
        digest = hashlib.sha256(self.key.encode()).digest()
        generator = torch.Generator(like.device).manual_seed(int.from_bytes(digest[:7], "big"))
        kept = torch.rand(tuple(shape), generator=generator, device=like.device) >= self.p
        return kept.to(like.dtype).div_(1 - self.p)


def detach(model: nn.Module) -> dict[str, "LoRALinear"]:
    """Take the adapted layers off again; the model is the bare base."""
    layers = adapted_layers(model)
    for name, layer in layers.items():
        attach(model, name, layer.base)
    return layers


@contextmanager
def attach_temporarily(model: nn.Module, layers: dict[str, LoRALinear]) -> Iterator[None]:
    """The model with these layers in the places of the modules they wrap, for as long as the context lasts."""
    try:
        for name, layer in layers.items():
            attach(model, name, layer)
        yield
    finally:
        for name, layer in layers.items():
            attach(model, name, layer.base)


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """The base model itself, for as long as the context lasts."""
    layers = list(adapted_layers(model).values())
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
