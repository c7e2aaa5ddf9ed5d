"""What a run minimizes, and the one place where rows go forward and gradients come back.

An `Objective` says what the loss of rows is. Next-token loss is the first one; a loss over preferred and rejected
answers would be another class beside it. Training, the trial before it, preheating and the gradients that some
initializations start from all call `forward_backward` or `backward`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from lorainit.data.batches import Batch
from lorainit.data.dataset import Sample
from lorainit.model.forward.loss import row_losses, tallies


@dataclass(frozen=True)
class Sums:
    """Of one adapter's rows in a pass: the sum of their losses, what it is to be divided by, and sums of metrics.

    Sums and not means: the caller divides by the count of the whole effective batch.
    """

    loss: Tensor
    count: int
    metrics: dict[str, Tensor]


def added(total: Sums, part: Sums) -> Sums:
    """Both together."""
    metrics = {name: value + part.metrics[name] for name, value in total.metrics.items()}
    return Sums(total.loss + part.loss, total.count + part.count, metrics)


class Objective(Protocol):
    """From rows to the loss of each adapter, and metrics beside it."""

    @property
    def metrics(self) -> Sequence[str]:
        """Names of the metrics; each is reported as its sum over the count."""
        ...

    def count(self, row: Sample) -> int:
        """What a row adds to the count: its trained tokens, or 1 for a pair of answers."""
        ...

    def sums(self, model: nn.Module, batch: Batch, counts: list[int]) -> list[Sums]:
        """Run a batch of several adapters' rows; one `Sums` for each, of its `counts` in turn (differentiable)."""
        ...

    def row_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of each row of a padded batch (differentiable)."""
        ...


class NextToken:
    """The mean negative log-likelihood, in nats, of the trained tokens."""

    metrics = ("mean_token_accuracy",)

    def count(self, row: Sample) -> int:
        """Trained tokens; the first token of a row has no prediction."""
        return int(row.trained[1:].sum())

    def sums(self, model: nn.Module, batch: Batch, counts: list[int]) -> list[Sums]:
        """As `Objective.sums`."""
        parts = tallies(model, batch, counts)
        return [Sums(part.loss, part.tokens, {"mean_token_accuracy": part.correct}) for part in parts]

    def row_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """As `Objective.row_losses`."""
        return row_losses(model, batch)


NEXT_TOKEN = NextToken()


def no_sums(objective: Objective, device: torch.device) -> Sums:
    """The sums over no rows."""
    metrics = {name: torch.zeros((), dtype=torch.long, device=device) for name in objective.metrics}
    return Sums(torch.zeros((), device=device), 0, metrics)


def forward_backward(
    model: nn.Module, objective: Objective, batch: Batch, counts: list[int], divisors: Sequence[int] | None = None
) -> list[Sums]:
    """One pass: add to the gradients those of each adapter's loss over its divisor; the sums are detached.

    Args:
        counts: what each adapter's rows add to the count, in the order of the batch.
        divisors: the count of each adapter's effective batch; None = 1. Nobody's gradient depends on the others.
    """
    parts = objective.sums(model, batch, counts)
    losses = [part.loss for part in parts]
    if divisors is not None:
        losses = [loss / divisor for loss, divisor in zip(losses, divisors, strict=True)]
    backward(losses)
    return [replace(part, loss=part.loss.detach()) for part in parts]


def backward(losses: Sequence[Tensor]) -> None:
    """Add the gradients of the sum of these losses to what they depend on."""
    torch.autograd.backward(losses[0] if len(losses) == 1 else torch.stack(list(losses)).sum())
