"""Gathering evidence: which collector serves which need."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lorainit.data import Sample
from lorainit.events import Event
from lorainit.evidence import Evidence
from lorainit.evidence.activations import principal_directions, second_moments
from lorainit.evidence.gradients import gradient_evidence
from lorainit.evidence.originals import original_weights
from lorainit.evidence.preheat import preheat
from lorainit.spec import EVA, HRP, CorDA, Hyperparameters, InitConfig, LoftQ, Lora, LoRAGA, LoRAOne


@dataclass(frozen=True)
class Context:
    """What a collector works with.

    model: the plain base model, in eval mode, all parameters frozen.
    targets: the modules to adapt, by name.
    samples: calibration rows (the calibration file's, else the training file's) in file order.
    training_samples: the training rows, for methods that train.
    order: the run's own permutation of the training rows in an epoch.
    folder: where the base model's files are; None for a model that was not loaded from any.
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
    order: Callable[[int], Sequence[int]]
    folder: Path | None = None


def collect(config: InitConfig, context: Context) -> dict[str, Evidence]:
    """The evidence of each target for this method."""
    if isinstance(config, LoftQ):
        return original_weights(context)
    if config.facts.needs in ("none", "weight"):
        return {name: Evidence() for name in context.targets}
    if isinstance(config, LoRAGA | LoRAOne):
        return gradient_evidence(config, context)
    if isinstance(config, HRP):
        return preheat(config, context)
    if isinstance(config, EVA):
        return principal_directions(config, context)
    if isinstance(config, CorDA):
        return second_moments(config, context)
    raise AssertionError(config.facts.needs)
