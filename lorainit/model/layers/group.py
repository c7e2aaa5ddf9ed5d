"""Several adapters on one base in one forward pass: each sees its own rows of a packed batch.

The frozen matrices are multiplied once for all rows, the low-rank parts separately for each adapter
(`lorainit.model.layers.low_rank`), so that each adapter's loss and gradients are the same as if it were trained alone.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lorainit.model.layers.layer import LoRALinear, attach
from lorainit.model.layers.low_rank import apply_low_rank

Layers = Mapping[str, LoRALinear]
Spans = list[tuple[int, int]]  # first token and end of each adapter's part of a pass


class GroupedLinear(nn.Module):
    """One frozen linear map with the layers of several adapters.

    `layers`: one for each adapter of the pass; None if it does not adapt this module. `spans` is shared by all modules
    of a model and changed for every pass, so that not every module has to be updated.
    """

    def __init__(self, base: nn.Module, layers: Sequence[LoRALinear | None], spans: Spans) -> None:
        super().__init__()
        self.base = base
        self._pairs = layers, spans  # in a tuple, so that torch does not register the layers as this module's children

    def forward(self, x: Tensor) -> Tensor:
        """Map (1, tokens, in) to (1, tokens, out); OPT gives and takes its rows without the first dimension."""
        pairs = list(zip(*self._pairs, strict=True))
        if any(layer is not None and layer.magnitude is not None for layer, _ in pairs):
            # Each adapter's rows go through separately, because DoRA's output is not W·x plus a low-rank product.
            return torch.cat([(layer or self.base)(x[..., start:stop, :]) for layer, (start, stop) in pairs], dim=-2)
        slots = [layer.make_slot(*span, like=x) for layer, span in pairs if layer is not None and len(layer.A)]
        return apply_low_rank(x, self.base, slots)


def group_layers(adapters: Sequence[Layers], spans: Spans) -> dict[str, GroupedLinear]:
    """One grouped layer for each module that at least one of these adapters changes."""
    bases = {name: layer.base for layers in adapters for name, layer in layers.items()}
    return {name: GroupedLinear(base, [layers.get(name) for layers in adapters], spans) for name, base in bases.items()}


class AdapterSlots:
    """Attaches one adapter's layers, or a group's, to a model, and removes them again.

    Attaching the same adapters again only changes their spans, because replacing modules takes time.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.spans = Spans()
        self._adapters: list[Layers] = []
        self._attached: Mapping[str, LoRALinear | GroupedLinear] = {}

    def put(self, adapters: list[Layers], spans: Spans) -> None:
        """Attach these adapters, each for its span of the next pass's tokens; a single adapter gets all tokens."""
        self.spans[:] = spans
        if [id(layers) for layers in adapters] == [id(layers) for layers in self._adapters]:
            return
        self.clear()
        self._adapters = adapters
        self._attached = adapters[0] if len(adapters) == 1 else group_layers(adapters, self.spans)
        for name, layer in self._attached.items():
            attach(self.model, name, layer)

    def clear(self) -> None:
        """Detach all adapters."""
        for name, layer in self._attached.items():
            attach(self.model, name, layer.base)
        self._adapters, self._attached = [], {}
