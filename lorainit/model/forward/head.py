"""Cross-entropy through a frozen output head, a few positions at a time, and which heads allow that.

It is done in pieces because with a large vocabulary the logits are what fills memory first.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from transformers.modeling_outputs import MoeModelOutputWithPast

from lorainit.runtime.machine_errors import is_machine_failure

# How many logits exist at once: 64 MB in float32. With SmolLM2's vocabulary of 49,152 these are 341 positions.
LOGITS = 1 << 24


def head_losses(
    head: nn.Linear, hidden: Tensor, positions: Tensor, targets: Tensor, counts: list[int]
) -> tuple[Tensor, Tensor]:
    """The loss of each target at its position in nats, and whether it is predicted right.

    Args:
        hidden: positions×width, for all positions.
        counts: how many consecutive targets belong to each adapter; no piece contains targets of two adapters.
    """
    pieces = _pieces(counts, vocabulary=len(head.weight))
    losses, right = _Head.apply(hidden, head.weight, head.bias, positions, targets, pieces)  # type: ignore[no-untyped-call]
    return losses, right


_PLAIN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def is_plain(model: Any) -> bool:
    """Whether the logits are the head's unchanged output. Some architectures scale or cap them.

    Found out once by a trial: the model's layers are replaced by zeros, the head's output by known numbers, and the
    model's logits are compared with these. `Base.load` calls this first, because later an initialization may have hooks
    on the layers, which the trial could trigger in an architecture whose layers are not replaced.
    """
    if model not in _PLAIN:
        head = model.get_output_embeddings()
        _PLAIN[model] = type(head) is nn.Linear and not head.weight.requires_grad and _returns_its_input(model, head)
    return _PLAIN[model]


class _Nothing(MoeModelOutputWithPast):
    """Hidden states, and None for everything else that an architecture may ask for: caches, experts' losses."""

    def __getattr__(self, _name: str) -> None:
        return None


@torch.no_grad()
def _returns_its_input(model: Any, head: nn.Linear) -> bool:
    device = head.weight.device
    said = torch.linspace(-100, 100, head.weight.shape[0], dtype=head.weight.dtype, device=device)
    nothing = _Nothing(last_hidden_state=head.weight.new_zeros(1, 1, head.weight.shape[1]))
    # OPT calls the decoder inside its base model, most others call the base model, so both are replaced. A module that
    # contains the head is not, because the head must run: PEFT's wrapper has the whole architecture as its base model.
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
        return False  # it needs more than hidden states from its decoder, so this trial cannot show that it is plain
    finally:
        handle.remove()
        for stage in stages:
            del stage.forward
    return torch.equal(heard[0, 0], said)


def _pieces(counts: list[int], *, vocabulary: int) -> list[tuple[int, int]]:
    """Cut the positions of each adapter separately, so that its sums do not depend on the other adapters."""
    size, pieces, start = max(1, LOGITS // vocabulary), list[tuple[int, int]](), 0
    for count in counts:
        pieces += [(at, min(at + size, start + count)) for at in range(start, start + count, size)]
        start += count
    return pieces


class _Head(torch.autograd.Function):
    """Cross-entropy through a frozen head, a few positions at a time, so that at most `LOGITS` logits exist at once.

    The loss is a sum over positions. So each position's gradient is computed in the forward pass, while its logits
    exist, and the backward pass only scales it. No logits are computed twice.
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
            best = logits.argmax(-1, keepdim=True)  # after `.float()`, because argmax of bf16 takes six times as long
            right[start:stop] = (best == target)[:, 0]
            # Not log_softmax, because that and its exponential take three times as long as softmax. Subtracting the
            # largest logit keeps this as exact.
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
