"""What a run minimizes: the mean negative log-likelihood, in nats, of the trained tokens.

One place, so that training, evaluation and the gate of the initialization mean the same number.
"""

from typing import NamedTuple

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


def tally(logits: Tensor, batch: Batch) -> Tally:
    """Sum, not mean: the caller divides by the tokens of the whole effective batch."""
    mask = batch.trained[:, 1:]
    predicted, targets = logits[:, :-1][mask].float(), batch.ids[:, 1:][mask]
    loss = F.cross_entropy(predicted, targets, reduction="sum")
    with torch.no_grad():
        correct = int((predicted.argmax(-1) == targets).sum())
    return Tally(loss, targets.numel(), correct)
