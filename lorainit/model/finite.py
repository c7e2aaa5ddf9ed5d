"""Whether the numbers of a base are numbers: each weight is read once, before anything is computed with it."""

from torch import nn

from lorainit.config.errors import UnsupportedModel
from lorainit.model.layers.weight import weight_of


def require_finite(model: nn.Module) -> None:
    """Refuse a base of which nothing that is computed could mean anything.

    Raises:
        UnsupportedModel: a weight has entries that are NaN or infinite; the message names the first such weight.
    """
    for prefix, module in model.named_modules():
        for name, weight in module.named_parameters(prefix, recurse=False):
            # Four-bit weights are numbers of a table; they are infinite where the scale of their block is.
            numbers = weight if weight.is_floating_point() else weight_of(module)
            if hasattr(numbers, "to_local"):  # of a base that is divided, each process looks at its own part
                numbers = numbers.to_local()
            if not numbers.numel():
                continue
            lowest, highest = numbers.detach().aminmax()
            if not (lowest.isfinite() and highest.isfinite()):
                raise UnsupportedModel(f"{name}: the base weight has non-finite entries.", param="model")
