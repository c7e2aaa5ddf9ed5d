"""What a run minimizes: the mean negative log-likelihood, in nats, of the trained tokens.

One place, so that training, evaluation and the gate of the initialization mean the same number.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from lorainit.data import Batch


class Tally(NamedTuple):
    """Sums over the trained tokens of a batch: loss (differentiable), tokens, tokens predicted right."""

    loss: Tensor
    tokens: int
    correct: int


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """Rows×length×vocabulary, in the model's dtype."""
    logits: Tensor = model(input_ids=batch.ids, attention_mask=batch.attention).logits
    return logits


def tally(model: nn.Module, batch: Batch) -> Tally:
    """Run a batch. Sums, not means: the caller divides by the tokens of the whole effective batch.

    The output head sees only the positions that predict a trained token: with a large vocabulary its
    logits are what fills memory first, and prompts are a third to a half of typical rows.
    """
    with _only(model, batch.trained[:, 1:]):
        predicted = logits_of(model, batch).float()
    targets = batch.ids[:, 1:][batch.trained[:, 1:]]
    loss = F.cross_entropy(predicted, targets, reduction="sum")
    with torch.no_grad():
        correct = int((predicted.argmax(-1) == targets).sum())
    return Tally(loss, targets.numel(), correct)


def row_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Mean loss over the trained tokens of each row (differentiable); every row must have one.

    What a row's mean is does not depend on the rows it shares the pass with.
    """
    wanted = batch.trained[:, 1:]
    with _only(model, wanted):
        predicted = logits_of(model, batch).float()
    losses = F.cross_entropy(predicted, batch.ids[:, 1:][wanted], reduction="none")
    counts = wanted.sum(1)
    row = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    return torch.zeros(len(counts), device=losses.device).index_add(0, row, losses) / counts


@contextmanager
def _only(model: Any, positions: Tensor) -> Iterator[None]:
    """Let the output head see hidden states at `positions` (rows×length-1) only: logits are n×vocabulary."""

    def select(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0][:, :-1][positions],)

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
