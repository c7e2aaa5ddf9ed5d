"""Gathering evidence: which collector serves which need."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lorainit.data import Sample
from lorainit.events import Event
from lorainit.evidence import Evidence
from lorainit.spec import Hyperparameters, InitConfig, Lora


@dataclass(frozen=True)
class Context:
    """What a collector works with.

    model: the plain base model, in eval mode, all parameters frozen.
    targets: the modules to adapt, by name.
    samples: calibration rows (the calibration file's, else the training file's) in file order.
    training_samples: the training rows, for methods that train.
    """

    model: nn.Module
    targets: dict[str, nn.Module]
    samples: Sequence[Sample]
    training_samples: Sequence[Sample]
    pad: int
    device: torch.device
    micro_batch_size: int
    lora: Lora
    training: Hyperparameters
    total_steps: int
    seed: int
    on_event: Callable[[Event], None]


def collect(config: InitConfig, context: Context) -> dict[str, Evidence]:
    """The evidence of each target for this method."""
    if config.facts.needs in ("none", "weight"):
        return {name: Evidence() for name in context.targets}
    raise AssertionError(config.facts.needs)
