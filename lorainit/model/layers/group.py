"""Several adapters on one base in one forward pass: each sees its own rows of a packed batch.

The frozen matrices are multiplied once for all rows, the low-rank parts adapter by adapter
(`lorainit.model.layers.low_rank`), so each adapter's loss and gradients are those it would have alone. Knows
nothing of optimizers, data or files.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lorainit.model.layers.layer import LoRALinear, attach
from lorainit.model.layers.low_rank import low_rank

Layers = Mapping[str, LoRALinear]
Spans = list[tuple[int, int]]  # first token and end of each adapter's part of a pass


class GroupedLinear(nn.Module):
    """One frozen linear map under the adapters that have a layer on it.

    `layers`: one for each adapter of the pass, None where it leaves this module alone. `spans` is
    shared by all modules of a model, and written anew for every pass.
    """

    def __init__(self, base: nn.Module, layers: Sequence[LoRALinear | None], spans: Spans) -> None:
        super().__init__()
        self.base = base
        self._pairs = layers, spans  # a tuple: the adapters' layers belong to them, not to this module

    def forward(self, x: Tensor) -> Tensor:
        """Map (1, tokens, in) to (1, tokens, out); OPT gives and takes its rows without the first dimension."""
        pairs = list(zip(*self._pairs, strict=True))
        if any(layer is not None and layer.magnitude is not None for layer, _ in pairs):
            # DoRA is no sum of W·x and a product of rank r: everybody's rows go alone.
            return torch.cat([(layer or self.base)(x[..., start:stop, :]) for layer, (start, stop) in pairs], dim=-2)
        slots = [layer.slot(*span, like=x) for layer, span in pairs if layer is not None and len(layer.A)]
        return low_rank(x, self.base, slots)


def group_layers(adapters: Sequence[Layers], spans: Spans) -> dict[str, GroupedLinear]:
    """For every module that any of these adapters changes, the layer for all of them."""
    bases = {name: layer.base for layers in adapters for name, layer in layers.items()}
    return {name: GroupedLinear(base, [layers.get(name) for layers in adapters], spans) for name, base in bases.items()}


class AdapterSlots:
    """What stands in the places of a model's frozen modules: one adapter's own layers, or a group's.

    Putting the same adapters again moves only their spans.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.spans = Spans()
        self._adapters: list[Layers] = []
        self._attached: Mapping[str, LoRALinear | GroupedLinear] = {}

    def put(self, adapters: list[Layers], spans: Spans) -> None:
        """Place these adapters, each on its span of the tokens to come; a single one gets all of them."""
        self.spans[:] = spans
        if [id(layers) for layers in adapters] == [id(layers) for layers in self._adapters]:
            return
        self.clear()
        self._adapters = adapters
        self._attached = adapters[0] if len(adapters) == 1 else group_layers(adapters, self.spans)
        for name, layer in self._attached.items():
            attach(self.model, name, layer)

    def clear(self) -> None:
        """The bare base again."""
        for name, layer in self._attached.items():
            attach(self.model, name, layer.base)
        self._adapters, self._attached = [], {}
