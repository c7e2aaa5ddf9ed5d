"""Checks that all weights of a base are finite, once, before anything is computed with them."""

from torch import nn

from lorainit.config.errors import UnsupportedModel
from lorainit.model.layers.weight import weight_of


def require_finite(model: nn.Module) -> None:
    """Refuse a base with NaN or infinite weights, because every result computed with it would be meaningless.

    Raises:
        UnsupportedModel: a weight has entries that are NaN or infinite; the message names the first such weight.
    """
    for prefix, module in model.named_modules():
        for name, weight in module.named_parameters(prefix, recurse=False):
            # Four-bit weights are indices into a table. Whether they are finite depends on the scales of their blocks,
            # so they are dequantized first.
            numbers = weight if weight.is_floating_point() else weight_of(module)
            if hasattr(numbers, "to_local"):  # of a sharded base each process checks its own part
                numbers = numbers.to_local()
            if not numbers.numel():
                continue
            lowest, highest = numbers.detach().aminmax()
            if not (lowest.isfinite() and highest.isfinite()):
                raise UnsupportedModel(f"{name}: the base weight has non-finite entries.", param="model")
