"""Cross-entropy through a frozen output head: which heads are plain, and their loss a few positions at a time.

With a large vocabulary logits are what fills memory first. Knows hidden states and tokens, and nothing of rows.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from transformers.modeling_outputs import MoeModelOutputWithPast

from lorainit.runtime.machine_errors import is_machine_failure

# Logits held at once: 64 MB in float32. SmolLM2's 49,152 words make that 341 positions.
LOGITS = 1 << 24


def head_losses(
    head: nn.Linear, hidden: Tensor, positions: Tensor, targets: Tensor, counts: list[int]
) -> tuple[Tensor, Tensor]:
    """Loss of each target at its position, and whether it is predicted right.

    Args:
        hidden: positions×width, of all positions.
        counts: how many of the targets belong together: they are cut by themselves.
    """
    pieces = _pieces(counts, vocabulary=len(head.weight))
    losses, right = _Head.apply(hidden, head.weight, head.bias, positions, targets, pieces)  # type: ignore[no-untyped-call]
    return losses, right


_PLAIN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def is_plain(model: Any) -> bool:
    """Whether logits are the head's output as it is: some architectures scale or cap them.

    Asked of the architecture itself, once: what runs the layers is made to return zeros and the head to say known
    numbers. `Base.load` asks; later, initializations may be watching the layers, and an architecture whose layers
    are run by something else would run them here.
    """
    if model not in _PLAIN:
        head = model.get_output_embeddings()
        _PLAIN[model] = type(head) is nn.Linear and not head.weight.requires_grad and _returns_its_input(model, head)
    return _PLAIN[model]


class _Nothing(MoeModelOutputWithPast):
    """Hidden states, and None for whatever else an architecture passes on: caches, cross-attention, experts' losses."""

    def __getattr__(self, _name: str) -> None:
        return None


@torch.no_grad()
def _returns_its_input(model: Any, head: nn.Linear) -> bool:
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
