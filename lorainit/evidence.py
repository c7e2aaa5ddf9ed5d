"""What a method may look at beside the weight of its own layer.

A method declares its need in `lorainit.spec`; it is collected here, once per run, before the first
layer is initialized. No method of this release needs more than the weight, so `Evidence` is empty;
gradients, activations and preheated adapters become its fields when the first method needs them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from lorainit.errors import UnsupportedInit
from lorainit.spec import InitConfig


@dataclass(frozen=True)
class Evidence:
    """What was collected for one layer."""


def collect(config: InitConfig, modules: Iterable[str]) -> dict[str, Evidence]:
    """The evidence of each module for this method.

    Raises:
        UnsupportedInit: the method needs more than weights.
    """
    if config.facts.needs not in ("none", "weight"):
        raise UnsupportedInit(
            f"This method needs {config.facts.needs} evidence, which is collected from the next release on.",
            param="lora.init",
        )
    return {name: Evidence() for name in modules}
