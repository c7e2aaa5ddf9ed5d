"""The loss that a run minimizes, and the only place with a forward and a backward pass.

An `Objective` defines the loss of rows. The only one so far is the next-token loss; a loss over preferred and rejected
answers would be another class. Training, the memory dry run before it, the preheat and initializations that need
gradients all call `forward_backward` or `backward`, so that they minimize the same loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from lorainit.config.errors import UnsupportedModel
from lorainit.data.batches import Batch
from lorainit.data.dataset import Sample
from lorainit.model.forward.head import head_losses, is_plain


@dataclass(frozen=True)
class Sums:
    """Sums over one adapter's rows in a pass: losses, the count to divide them by, and metrics.

    Sums instead of means, because the caller divides by the count of the whole effective batch, which has several
    passes.
    """

    loss: Tensor
    count: int
    metrics: dict[str, Tensor]


def add_sums(total: Sums, part: Sums) -> Sums:
    """The sums over both."""
    metrics = {name: value + part.metrics[name] for name, value in total.metrics.items()}
    return Sums(total.loss + part.loss, total.count + part.count, metrics)


class Objective(Protocol):
    """Computes the loss of each adapter from its rows, and metrics."""

    @property
    def metrics(self) -> Sequence[str]:
        """Names of the metrics; each is reported as its sum divided by the count."""
        ...

    def count(self, row: Sample) -> int:
        """How much a row adds to the count: its number of trained tokens, or 1 for a pair of answers."""
        ...

    def sums(self, model: nn.Module, batch: Batch, counts: list[int]) -> list[Sums]:
        """Run a batch with rows of several adapters; return one `Sums` (differentiable) per adapter.

        Args:
            counts: how much each adapter's rows add to the count, in the order of the batch.
        """
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
        parts = sum_losses_by_adapter(model, batch, counts)
        return [Sums(part.loss, part.tokens, {"mean_token_accuracy": part.correct}) for part in parts]

    def row_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """As `Objective.row_losses`."""
        return row_losses(model, batch)


NEXT_TOKEN = NextToken()


def zero_sums(objective: Objective, device: torch.device) -> Sums:
    """The sums over no rows."""
    metrics = {name: torch.zeros((), dtype=torch.long, device=device) for name in objective.metrics}
    return Sums(torch.zeros((), device=device), 0, metrics)


def forward_backward(
    model: nn.Module, objective: Objective, batch: Batch, counts: list[int], divisors: Sequence[int] | None = None
) -> list[Sums]:
    """Run one pass and add the gradients of each adapter's loss, divided by its divisor; the sums are detached.

    Args:
        counts: how much each adapter's rows add to the count, in the order of the batch.
        divisors: the count of each adapter's effective batch; None = 1. One per adapter, so that no adapter's gradient
            depends on the others.
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


# --- next-token loss -----------------------------------------------------------------------------


class LossSums(NamedTuple):
    """Sums over the trained tokens of a batch: loss (differentiable), tokens, tokens predicted right."""

    loss: Tensor
    tokens: int
    correct: Tensor


class BatchResult(NamedTuple):
    """The result of one pass over a padded batch: its sums, and on request the logits of one row, length×vocabulary."""

    sums: LossSums
    logits_of_row: Callable[[int], Tensor]


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """Rows×length×vocabulary, in the model's dtype."""
    logits: Tensor = model(input_ids=batch.ids, use_cache=False, **batch.layout).logits
    return logits


def sum_losses(model: nn.Module, batch: Batch) -> LossSums:
    """Run a batch. Sums, because the caller divides by the tokens of the whole effective batch."""
    losses, correct = _token_losses(model, batch)
    return LossSums(losses.sum(), len(batch.targets), correct.sum())


def run_batch(model: Any, batch: Batch) -> BatchResult:
    """Run a batch and return its sums and its logits. The logits are made row by row, because those of all rows would
    fill memory if the vocabulary is large.

    If the head is plain (`is_plain`), a row's logits are computed from this pass. Otherwise the row is run again when
    it is asked for, with the weights that the model has then.
    """
    hidden, predicted = _last_hidden(model, batch)
    losses, correct = _losses_from_hidden(model, batch, hidden, predicted)

    def logits_of_row(row: int) -> Tensor:
        if predicted is not None:
            return logits_of(model, batch.cut(1)[row])[0]
        head = model.get_output_embeddings()
        return F.linear(hidden.unflatten(0, batch.ids.shape)[row], head.weight, head.bias)

    return BatchResult(LossSums(losses.sum(), len(batch.targets), correct.sum()), logits_of_row)


def sum_losses_by_adapter(model: nn.Module, batch: Batch, counts: list[int]) -> list[LossSums]:
    """The same for a batch with rows of several adapters: one result each, from its number of trained tokens."""
    losses, correct = _token_losses(model, batch, counts)
    parts = zip(losses.split(counts), correct.split(counts), counts, strict=True)
    return [LossSums(loss.sum(), count, right.sum()) for loss, right, count in parts]


def row_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Mean loss over the trained tokens of each row of a padded batch (differentiable); every row must have one.

    A row's mean does not depend on the other rows of the pass.
    """
    losses, _ = _token_losses(model, batch)
    row = batch.predicting // batch.ids.shape[1]
    counts = torch.bincount(row, minlength=len(batch.ids))
    return torch.zeros(len(counts), device=losses.device).index_add(0, row, losses) / counts


def _token_losses(model: Any, batch: Batch, counts: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """Loss of each trained token and whether it is predicted right, in the order of `batch.predicting`."""
    return _losses_from_hidden(model, batch, *_last_hidden(model, batch), counts)


def _losses_from_hidden(
    model: Any, batch: Batch, hidden: Tensor, logits: Tensor | None, counts: list[int] | None = None
) -> tuple[Tensor, Tensor]:
    head = model.get_output_embeddings()
    if logits is None:
        return head_losses(head, hidden, batch.predicting, batch.targets, counts or [len(batch.targets)])
    logits = logits.float()
    losses = F.cross_entropy(logits, batch.targets, reduction="none")
    return losses, logits.detach().argmax(-1) == batch.targets


def _last_hidden(model: Any, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """The output head's input, positions×width, and the logits if the head is not plain (`is_plain`).

    The head gets only the positions that predict a trained token, because with a large vocabulary its logits fill
    memory first, and prompts are a third to a half of typical rows.

    Raises:
        UnsupportedModel: the head is not given every position once.
    """
    plain = is_plain(model)
    seen: list[Tensor] = []

    def select(_head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        flat = args[0].flatten(0, -2)
        seen.append(flat)
        return (flat[:0] if plain else flat[batch.predicting],)

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        logits = logits_of(model, batch)
    finally:
        handle.remove()
    if len(seen) != 1 or len(seen[0]) != batch.ids.numel():
        raise UnsupportedModel("The base model's output head is not given every position once.", param="model")
    return seen[0], None if plain else logits.flatten(0, -2)
