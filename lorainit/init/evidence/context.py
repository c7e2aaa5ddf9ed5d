"""What all collectors work with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lorainit.config.events import Event, Message
from lorainit.config.inits import EVA, CorDA, LoRAGA, LoRAOne
from lorainit.config.spec import Hyperparameters, Lora
from lorainit.data.batches import Budget, Regime, any_length
from lorainit.data.dataset import Sample
from lorainit.model.forward.objective import NEXT_TOKEN, Objective


@dataclass(frozen=True)
class Context:
    """What a collector works with.

    model: the plain base model, in eval mode, all parameters frozen.
    targets: the modules to adapt, by name.
    samples: calibration rows (the calibration file's, else the training file's) in file order.
    training_samples: the training rows, for methods that train.
    order: the run's own permutation of the training rows in an epoch.
    folder: where the base model's files are; None for a model that was not loaded from any.
    anybody: whether something is so in any process of the run, where several make the same passes; `divided`: they have
        to, since each has a part of the base.
    objective: what the run minimizes.
    budget: of one pass; `regime`: which rows may share one (`Base.regime`).
    """

    model: nn.Module
    targets: dict[str, nn.Module]
    samples: Sequence[Sample]
    training_samples: Sequence[Sample]
    pad: int
    device: torch.device
    budget: Budget
    lora: Lora
    training: Hyperparameters
    total_steps: int
    seed: int
    on_event: Callable[[Event], None]
    order: Callable[[int], Sequence[int]]
    folder: Path | None = None
    anybody: Callable[[bool], bool] = bool
    divided: bool = False
    regime: Regime = any_length
    objective: Objective = NEXT_TOKEN


def few_rows(config: LoRAGA | LoRAOne | EVA | CorDA, found: int) -> Message:
    """The warning that fewer rows were found than the method asked for."""
    text = f"{config.method} asked for {config.samples} calibration rows and there are {found}: all are used."
    return Message(level="warn", message=text, data={"kind": "init", "samples": found, "asked": config.samples})
