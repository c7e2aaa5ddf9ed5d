"""Evidence: what a method uses beside the weight of the layer, such as a gradient or statistics of the inputs.

The functions in `lorainit.init.collectors` collect it. A method gets only the `Evidence` of its own layer.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class StepSearch:
    """The step size that a line search has found for a displaced start: `gamma`, the same for all layers.

    tried: (gamma, mean loss on the rows of the search), largest gamma first, which is the smallest step.
    base_loss: the loss of the base model on the same rows.
    held_out: whether the gradient was computed from other rows than these.
    """

    gamma: float
    base_loss: float
    tried: tuple[tuple[float, float], ...]
    held_out: bool = False

    def facts(self) -> dict[str, Any]:
        """For events and reports. A loss that is not finite is None, because JSON has no number for it."""
        tried = [{"gamma": gamma, "loss": loss if math.isfinite(loss) else None} for gamma, loss in self.tried]
        return {"base_loss": self.base_loss, "held_out": self.held_out, "tried": tried}


@dataclass(frozen=True)
class Evidence:
    """What was collected for one layer; a field is None when the method did not need it. CPU tensors.

    gradient: mean gradient of the loss with respect to W, out×in, float32.
    second_moment: mean of x·xᵀ over the layer's inputs, in×in, float32.
    directions: orthonormal principal directions of the inputs, k×in, float32, strongest first.
    spread: singular values that belong to `directions`, k.
    rank: the rank of this layer, if the method gives layers different ranks.
    preheated: factors (A, B) of the preheated adapter, R×in and out×R, float32.
    original: the weight before quantization, out×in, in the dtype of the base's files.
    rows: how many calibration rows it was collected from.
    step: the line search of LoRA-One's gamma "auto", the same for all layers.
    starved: too few tokens were routed to this expert for the method, so it starts as kaiming does.
    """

    gradient: Tensor | None = None
    second_moment: Tensor | None = None
    directions: Tensor | None = None
    spread: Tensor | None = None
    rank: int | None = None
    preheated: tuple[Tensor, Tensor] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    original: Tensor | None = None
    rows: int | None = None
    step: StepSearch | None = None
    starved: bool = False
