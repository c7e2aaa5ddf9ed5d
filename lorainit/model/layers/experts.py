"""Mixtures of experts: the matrix of each expert as a linear layer of its own.

transformers keeps all experts of a layer in one 3-D parameter, so there is no linear layer that could be adapted.
`install` makes a module for each expert's matrix, which is a view and copies nothing, and sends the tokens through
these modules. Afterwards an expert can be adapted, observed and exported like any linear layer (docs/decisions/0024).
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

_INTERFACE = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_apply_gate")


class ExpertLinear(nn.Module):
    """One expert's matrix: y = W·x + bias with W (out×in) a view of the stack's parameter."""

    def __init__(self, stack: "ExpertStack", number: int) -> None:
        super().__init__()
        self._owner = (stack,)  # in a tuple, so that torch does not register it: the weight would be saved twice
        self.number = number

    @property
    def stack(self) -> "ExpertStack":
        """All experts of this projection."""
        return self._owner[0]

    @property
    def weight(self) -> Tensor:
        """The expert's matrix as out×in, even if the base stores in×out."""
        W = self.stack.gather("weight")[self.number]
        return W.T if self.stack.transposed else W

    @property
    def bias(self) -> Tensor | None:
        """The expert's bias (out), or None."""
        return None if self.stack.bias is None else self.stack.gather("bias")[self.number]

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.stack.weight.shape[2 if self.stack.transposed else 1]

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.stack.weight.shape[1 if self.stack.transposed else 2]

    def forward(self, x: Tensor) -> Tensor:
        """Map (tokens, in) to (tokens, out)."""
        return F.linear(x, self.weight, self.bias)


class ExpertStack(nn.ModuleList):
    """All experts of one projection: the base's own 3-D parameter, and a layer for each expert.

    Attributes:
        weight: experts×out×in, or experts×in×out where `transposed`; bias: experts×out or None.
        parameter: the parameter's name in the base (`gate_up_proj`).
        place: its position among the adaptable parameters of its module, from 0, in the order of registration.
        flipped: whether PEFT takes this matrix for its transpose. It reads the module's `is_transposed`, which
            Llama 4's experts do not have although they are transposed.
        tokens: while an expert runs, which of the pass's tokens it gets; of: how many tokens the pass has.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        *,
        parameter: str,
        place: int,
        transposed: bool,
        flipped: bool,
    ) -> None:
        super().__init__(ExpertLinear(self, number) for number in range(len(weight)))
        self.weight = weight
        self.register_parameter("bias", bias)
        self.parameter, self.place = parameter, place
        self.transposed, self.flipped = transposed, flipped
        self.tokens: Tensor | None = None
        self.of = 0

    def gather(self, name: str) -> Tensor:
        """The whole parameter. If the base is sharded, outside of a pass, all processes must call this together."""
        found: Tensor = getattr(self, name)
        return found.full_tensor() if hasattr(found, "full_tensor") else found


# --- installing ----------------------------------------------------------------------------------


def install(model: nn.Module) -> dict[str, ExpertStack]:
    """Put a layer for each expert's matrix into `model`, in place; the stacks by name (`…experts.gate_up_proj`).

    Installing twice changes nothing. Works on meta tensors too. Experts that an architecture runs by code of its own
    stay as they are (`moe.find_left_out`).
    """
    for module in list(model.modules()):
        names = _projections(module)
        if names:
            _stand_before(module, names)
    return find_stacks(model)


def find_stacks(model: nn.Module) -> dict[str, ExpertStack]:
    """The installed stacks by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertStack)}


def _projections(module: nn.Module) -> tuple[str, str] | None:
    """The names of a module's two 3-D projections, if it is a mixture that `_route` or `_route_llama4` can run."""
    if all(hasattr(module, name) for name in _INTERFACE):
        names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    elif type(module).__name__ == "Llama4TextExperts":
        names = ("gate_up_proj", "down_proj")
    else:
        return None
    found = [p for p in map(module._parameters.get, names) if p is not None and p.ndim == 3 and p.is_floating_point()]
    # A single expert is left alone, because PEFT then makes a plain LoRA on two dimensions.
    return names if len(found) == 2 and len(found[0]) == len(found[1]) > 1 else None


def _stand_before(module: Any, names: tuple[str, str]) -> None:
    own = [name for name in module._parameters if name in names]
    declared = getattr(module, "is_transposed", False)
    transposed = declared or type(module).__name__ == "Llama4TextExperts"
    for name in names:
        weight, bias = module._parameters.pop(name), module._parameters.pop(f"{name}_bias", None)
        stack = ExpertStack(
            weight, bias, parameter=name, place=own.index(name), transposed=transposed, flipped=transposed != declared
        )
        module.register_module(name, stack)
    route = _route if hasattr(module, "_apply_gate") else _route_llama4
    module.forward = partial(route, module)


def find_runners(model: nn.Module) -> Iterator[Any]:
    """The modules whose `forward` is ours. They are not compiled, because their choice of rows depends on the data."""
    for module in model.modules():
        if any(isinstance(child, ExpertStack) for child in module.children()):
            yield module


# --- running -------------------------------------------------------------------------------------


def _route(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute what transformers' experts compute: each token's sum over its experts, weighted by the router.

    Args:
        hidden: tokens×width.
        top_k_index: tokens×k, the number of an expert; a number beyond the last expert means none.
        top_k_weights: tokens×k.
    """
    first, second = module.gate_up_proj if module.has_gate else module.up_proj, module.down_proj
    k, chosen = top_k_index.shape[-1], top_k_index.flatten()
    order = chosen.argsort(stable=True)
    counts = torch.bincount(chosen, minlength=len(second)).tolist()
    tokens = order // k

    def one(number: int, x: Tensor) -> Tensor:
        h = first[number](x)
        y: Tensor = second[number](module._apply_gate(h) if module.has_gate else module.act_fn(h))
        return module.post_expert_norm(y) if module.has_post_expert_norm else y

    y = _each(one, (first, second), hidden.index_select(0, tokens), tokens, counts, of=len(hidden))
    weighed = y * top_k_weights.flatten()[order, None]
    # Sorted by token again and summed in a fixed order. Not `index_add_`, because its order of sums varies on a GPU.
    found = weighed.index_select(0, order.argsort()).view(len(hidden), k, -1).sum(1)
    return found.to(hidden.dtype)


def _route_llama4(module: Any, routed: Tensor) -> Tensor:
    """Run Llama 4's experts on the tokens that they were chosen for.

    Llama 4 gives every expert all tokens, with zeros where it was not chosen. Zeros give zeros, so they are skipped.

    Args:
        routed: experts·tokens×width, already weighted by the router.
    """
    first, second = module.gate_up_proj, module.down_proj
    x = routed.view(len(first), -1, routed.shape[-1])
    chosen = x.detach().ne(0).any(-1)
    where = chosen.flatten().nonzero()[:, 0]

    def one(number: int, x: Tensor) -> Tensor:
        gate, up = first[number](x).chunk(2, dim=-1)
        y: Tensor = second[number](up * module.act_fn(gate))
        return y

    found = routed.index_select(0, where)
    y = _each(one, (first, second), found, where % x.shape[1], chosen.sum(1).tolist(), of=x.shape[1])
    return torch.zeros_like(routed).index_copy(0, where, y)


def _each(
    run: Callable[[int, Tensor], Tensor],
    both: tuple[ExpertStack, ExpertStack],
    x: Tensor,
    tokens: Tensor,
    counts: list[int],
    *,
    of: int,
) -> Tensor:
    """Run each expert on its rows of x, which are sorted by expert. Rows without an expert become zeros."""
    found = []
    try:
        for number, (rows, which) in enumerate(zip(x.split(counts), tokens.split(counts), strict=True)):
            for stack in both:
                stack.tokens, stack.of = which, of
            if number >= len(both[1]):
                found.append(torch.zeros_like(rows))
            elif len(rows):
                found.append(run(number, rows))
    finally:
        for stack in both:
            stack.tokens = None
    return torch.cat(found) if found else x  # there may be no rows: for Llama 4 all tokens may be padding


def short_name(name: str, module: nn.Module) -> str:
    """The last part of a layer's name. For an expert, the part that all experts share: `experts.down_proj`."""
    parts = name.split(".")
    return ".".join(parts[-3:-1]) if isinstance(module, ExpertLinear) else parts[-1]


def full_name(name: str, module: nn.Module) -> str:
    """A layer's full name. For an expert, the name of the base's parameter, without the expert's number."""
    return name.rpartition(".")[0] if isinstance(module, ExpertLinear) else name
