"""Adapters of experts in PEFT's format: one pair for all experts of a 3-D parameter (`target_parameters`).

PEFT's `ParamWrapper` (peft/tuners/lora/layer.py) stacks the A of all experts vertically, expert by expert, and the B
side by side, rank by rank: column k·E + e is column k of expert e. A parameter has one rank in PEFT, so pairs of a
smaller rank are padded with zeros, which does not change their product. If a module has several adapted parameters,
their wrappers are nested with the first registered one innermost, and a tensor's name shows the depth.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from lorainit.model.layers.experts import ExpertLinear, ExpertStack
from lorainit.model.layers.layer import LoRALinear

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Packed:
    """The pair of one 3-D parameter: A (r·E×in) and B (out×r·E), E experts.

    `prefix`: the beginning of its tensors' names below the base model. `scale`: the factor of B·A.
    """

    A: Tensor
    B: Tensor
    rank: int
    scale: float
    prefix: str


def are_experts(layer: LoRALinear) -> bool:
    """Whether the layer adapts the matrix of one expert."""
    return isinstance(layer.base, ExpertLinear)


def pack(layers: Mapping[str, LoRALinear], factors: Mapping[str, Pair]) -> dict[str, Packed]:
    """The pairs of all 3-D parameters that `layers` adapt, by the parameter's name in the base.

    Args:
        layers: layers of experts (`are_experts`) by name; experts of a parameter without a layer get zeros.
        factors: A (r×in) and B (out×r) of each, as they should be written.
    """
    groups: dict[str, dict[int, Pair]] = {}
    known: dict[str, tuple[ExpertStack, float]] = {}
    for name, layer in layers.items():
        base = cast(ExpertLinear, layer.base)
        parameter = name.rpartition(".")[0]
        groups.setdefault(parameter, {})[base.number] = factors[name]
        known[parameter] = base.stack, layer.scale
    return {
        parameter: _packed(parameter, *known[parameter], pairs=pairs, depth=_depth(parameter, known))
        for parameter, pairs in groups.items()
    }


def _depth(parameter: str, known: Mapping[str, tuple[ExpertStack, float]]) -> int:
    """How many wrappers enclose this one: one for each adapted parameter of the module that is registered later."""
    module = parameter.rpartition(".")[0]
    place = known[parameter][0].place
    return sum(name.rpartition(".")[0] == module and stack.place > place for name, (stack, _) in known.items())


def _packed(parameter: str, stack: ExpertStack, scale: float, *, pairs: Mapping[int, Pair], depth: int) -> Packed:
    rank = max(len(A) for A, _ in pairs.values())
    one = stack[0]
    assert isinstance(one, ExpertLinear | LoRALinear)
    base = cast(ExpertLinear, one.base if isinstance(one, LoRALinear) else one)
    A = torch.zeros(len(stack), rank, base.in_features)
    B = torch.zeros(len(stack), base.out_features, rank)
    for number, (a, b) in pairs.items():
        A[number, : len(a)], B[number, :, : len(a)] = a, b
    if stack.flipped:  # PEFT takes the matrix for its transpose, so the pair is transposed: (B·A)ᵀ = Aᵀ·Bᵀ
        A, B = B.mT, A.mT
    prefix = parameter.rpartition(".")[0] + ".base_layer" * depth
    return Packed(
        A=A.flatten(0, 1).contiguous(), B=B.permute(1, 2, 0).flatten(1).contiguous(), rank=rank, scale=scale,
        prefix=prefix,
    )  # fmt: skip
