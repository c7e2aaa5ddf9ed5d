"""What a run minimizes: the mean negative log-likelihood, in nats, of the trained tokens.

One place, so that training, evaluation and the gate of the initialization mean the same number.
"""

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from transformers.modeling_outputs import MoeModelOutputWithPast

from lorainit.config.errors import UnsupportedModel
from lorainit.data.batches import Batch
from lorainit.runtime.machine_errors import is_machine_failure

# Logits held at once: 64 MB in float32. SmolLM2's 49,152 words make that 341 positions.
LOGITS = 1 << 24


class Tally(NamedTuple):
    """Sums over the trained tokens of a batch: loss (differentiable), tokens, tokens predicted right."""

    loss: Tensor
    tokens: int
    correct: Tensor


class Look(NamedTuple):
    """What one pass tells of a padded batch: its tally, and on request the logits of one row, length×vocabulary."""

    tally: Tally
    logits_of_row: Callable[[int], Tensor]


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """Rows×length×vocabulary, in the model's dtype."""
    logits: Tensor = model(input_ids=batch.ids, use_cache=False, **batch.layout).logits
    return logits


def tally(model: nn.Module, batch: Batch) -> Tally:
    """Run a batch. Sums, not means: the caller divides by the tokens of the whole effective batch."""
    losses, correct = _losses(model, batch)
    return Tally(losses.sum(), len(batch.targets), correct.sum())


def look(model: Any, batch: Batch) -> Look:
    """A tally whose logits can be seen too, row by row: with a large vocabulary those of all rows fill memory first.

    Where logits are the head's output as it is, they come from this pass. Elsewhere each row is run again when it is
    asked for, by the model as it is then.
    """
    hidden, predicted = _last_hidden(model, batch)
    losses, correct = _judged(model, batch, hidden, predicted)

    def logits_of_row(row: int) -> Tensor:
        if predicted is not None:
            return logits_of(model, batch.cut(1)[row])[0]
        head = model.get_output_embeddings()
        return F.linear(hidden.unflatten(0, batch.ids.shape)[row], head.weight, head.bias)

    return Look(Tally(losses.sum(), len(batch.targets), correct.sum()), logits_of_row)


def tallies(model: nn.Module, batch: Batch, counts: list[int]) -> list[Tally]:
    """The same for a batch of several adapters' rows: one for each, of its `counts` trained tokens in turn."""
    losses, correct = _losses(model, batch, counts)
    parts = zip(losses.split(counts), correct.split(counts), counts, strict=True)
    return [Tally(loss.sum(), count, right.sum()) for loss, right, count in parts]


def row_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Mean loss over the trained tokens of each row of a padded batch (differentiable); every row must have one.

    What a row's mean is does not depend on the rows it shares the pass with.
    """
    losses, _ = _losses(model, batch)
    row = batch.predicting // batch.ids.shape[1]
    counts = torch.bincount(row, minlength=len(batch.ids))
    return torch.zeros(len(counts), device=losses.device).index_add(0, row, losses) / counts


def _losses(model: Any, batch: Batch, counts: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """Loss of each trained token and whether it is predicted right, in the order of `batch.predicting`."""
    return _judged(model, batch, *_last_hidden(model, batch), counts)


def _judged(
    model: Any, batch: Batch, hidden: Tensor, logits: Tensor | None, counts: list[int] | None = None
) -> tuple[Tensor, Tensor]:
    head = model.get_output_embeddings()
    if logits is None:
        pieces = _pieces(counts or [len(batch.targets)], vocabulary=len(head.weight))
        args = (hidden, head.weight, head.bias, batch.predicting, batch.targets, pieces)
        losses, right = _Head.apply(*args)  # type: ignore[no-untyped-call]
        return losses, right
    logits = logits.float()
    losses = F.cross_entropy(logits, batch.targets, reduction="none")
    return losses, logits.detach().argmax(-1) == batch.targets


def _last_hidden(model: Any, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """What the output head is given, positions×width, and logits where the head alone does not make them.

    The head sees only the positions that predict a trained token: with a large vocabulary its logits
    are what fills memory first, and prompts are a third to a half of typical rows.

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


_PLAIN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def is_plain(model: Any) -> bool:
    """Whether logits are the head's output as it is: some architectures scale or cap them.

    Asked of the architecture itself, once: what runs the layers is made to return zeros and the head to say known
    numbers. `Base.load` asks; later, initializations may be watching the layers, and an architecture whose layers
    are run by something else would run them here.
    """
    if model not in _PLAIN:
        head = model.get_output_embeddings()
        _PLAIN[model] = type(head) is nn.Linear and not head.weight.requires_grad and _says_what_it_hears(model, head)
    return _PLAIN[model]


class _Nothing(MoeModelOutputWithPast):
    """Hidden states, and None for whatever else an architecture passes on: caches, cross-attention, experts' losses."""

    def __getattr__(self, _name: str) -> None:
        return None


@torch.no_grad()
def _says_what_it_hears(model: Any, head: nn.Linear) -> bool:
    device = head.weight.device
    said = torch.linspace(-100, 100, head.weight.shape[0], dtype=head.weight.dtype, device=device)
    nothing = _Nothing(last_hidden_state=head.weight.new_zeros(1, 1, head.weight.shape[1]))
    # OPT runs the decoder inside of its base model, nearly everybody else the base model. What PEFT calls the base
    # model of its wrapper is the whole architecture: it holds the head, which has to be asked.
    runners = {id(stage): stage for stage in (model.base_model, model.get_decoder())}
    stages = [stage for stage in runners.values() if all(module is not head for module in stage.modules())]
    handle = head.register_forward_hook(lambda *_: said.expand(1, 1, -1))
    for stage in stages:
        stage.forward = lambda *_args, **_named: nothing
    try:
        heard: Tensor = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False).logits
    except Exception as error:
        if is_machine_failure(error):
            raise
        return False  # it wants more of its decoder than hidden states: nothing is known of it
    finally:
        handle.remove()
        for stage in stages:
            del stage.forward
    return torch.equal(heard[0, 0], said)


def _pieces(counts: list[int], *, vocabulary: int) -> list[tuple[int, int]]:
    """Cut each count of positions by itself, so that an adapter's sums do not depend on its company."""
    size, pieces, start = max(1, LOGITS // vocabulary), list[tuple[int, int]](), 0
    for count in counts:
        pieces += [(at, min(at + size, start + count)) for at in range(start, start + count, size)]
        start += count
    return pieces


class _Head(torch.autograd.Function):
    """Cross-entropy through a frozen head, some positions at a time: no more than `LOGITS` exist at once.

    The loss is a sum over positions, so each position's gradient is known in the forward pass, while its
    logits are there; the backward pass only scales it. Nothing is computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        W: Tensor,
        bias: Tensor | None,
        positions: Tensor,
        targets: Tensor,
        pieces: list[tuple[int, int]],
    ) -> tuple[Tensor, Tensor]:
        losses = torch.empty(len(positions), dtype=torch.float32, device=W.device)
        right = torch.empty(len(positions), dtype=torch.bool, device=W.device)
        grads = torch.empty(len(positions), W.shape[1], dtype=W.dtype, device=W.device)
        wanted = ctx.needs_input_grad[0]
        for start, stop in pieces:
            target = targets[start:stop, None]
            logits = F.linear(hidden[positions[start:stop]], W, bias).float()
            best = logits.argmax(-1, keepdim=True)  # of bf16 logits it takes six times as long
            right[start:stop] = (best == target)[:, 0]
            # log_softmax and its exponential take three times as long as a softmax, and this is no less exact.
            P = logits.softmax(-1)
            loss = logits.gather(1, best) - logits.gather(1, target) - P.gather(1, best).log()
            losses[start:stop] = loss[:, 0]
            if wanted:
                P.scatter_add_(1, target, -torch.ones_like(target, dtype=P.dtype))
                torch.mm(P.to(W.dtype), W, out=grads[start:stop])
        ctx.save_for_backward(grads, positions)
        ctx.shape = hidden.shape
        ctx.mark_non_differentiable(right)
        return losses, right

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        grads, positions = ctx.saved_tensors
        hidden = grads.new_zeros(ctx.shape)
        hidden[positions] = (grads * outer[0][:, None]).to(grads.dtype)
        return hidden, None, None, None, None, None
