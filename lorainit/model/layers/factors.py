"""The LoRA pair of one layer, returned by every initialization and used by every adapted layer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """A LoRA pair of one layer in float32: `A` (r×in) and `B` (out×r), and `facts` for the report."""

    A: Tensor
    B: Tensor
    facts: Mapping[str, Any] = field(default_factory=dict)
