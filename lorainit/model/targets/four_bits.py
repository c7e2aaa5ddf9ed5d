"""Which layers of an NF4 base are in four bits: those that stock transformers quantizes, except those that would fail.

The rule depends on the base only and not on what a run adapts, so that all runs have the same NF4 base
(docs/decisions/0032).
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from lorainit.config.model_facts import NF4_BLOCK, LeftOut
from lorainit.model.layers.quantize import PACKED_ROWS, nf4_config
from lorainit.model.layers.weight import shape_of
from lorainit.model.targets.peft_support import READ, UNUSED
from lorainit.model.targets.targets import TOWER, Layer, kinds_of, survey

_BLOCKS = f"its rows are no whole blocks of {NF4_BLOCK} weights"
_REASONS = {READ: "its weight is read directly, by code that cannot read four bits", UNUSED: UNUSED, TOWER: TOWER}


@dataclass(frozen=True)
class FourBits:
    """How a base is quantized to NF4.

    `kept`: kinds of layers that get no LoRA and stay in the run's own precision, each with the reason. `skip`: the
    value of transformers' `llm_int8_skip_modules`; None = its default. `unpackable`: bitsandbytes cannot repack every
    layer for a CPU (`lorainit.model.layers.quantize.settle` keeps it from trying).
    """

    kept: list[LeftOut]
    skip: list[str] | None
    unpackable: bool = False

    def describe(self, dtype: torch.dtype) -> dict[str, Any]:
        """What a download's manifest says about the base."""
        config = {**nf4_config(self.skip), "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}
        return {"bitsandbytes": config, "not_quantized": [layer.model_dump() for layer in self.kept]}

    def explain(self) -> str:
        """Which layers are not quantized, for the job's events."""
        names = dict[str, list[str]]()
        for layer in self.kept:
            names.setdefault(layer.reason, []).append(f"{layer.name} ({layer.count})")
        reasons = "; ".join(f"{', '.join(dict.fromkeys(some))}: {reason}" for reason, some in names.items())
        return f"Not in four bits, but in the run's own precision: {reasons}."


def choose_four_bits(model: nn.Module) -> FourBits:
    """Decide which layers of this base are quantized.

    Args:
        model: a causal language model of transformers, with or without weights, not quantized.
    """
    layers = survey(model)
    usual = get_keys_to_not_convert(model)
    quantized = {layer.path: layer for layer in layers.values() if _is_quantized(layer, usual)}
    why = {name: reason for name, layer in quantized.items() if (reason := _why_not(layer))}
    unpackable = any(shape_of(quantized[name].module)[0] % PACKED_ROWS for name in quantized.keys() - why.keys())
    if not why:
        return FourBits([], None, unpackable)
    others = quantized.keys() - why.keys()
    kept = kinds_of((layer.name, replace(layer, refusal=why[name])) for name, layer in quantized.items() if name in why)
    # This list replaces transformers' own, so it must also contain the modules of that one: the output head and what is
    # tied to it.
    apart = [name for name in _linear(model) if name in why or not should_convert_module(name, usual)]
    return FourBits(kept[1], sorted({_shortest(name, others) for name in apart}), unpackable)


def _linear(model: nn.Module) -> list[str]:
    """All linear layers, and the output head, which `survey` does not contain."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def _is_quantized(layer: Layer, usual: Sequence[str]) -> bool:
    """Whether stock transformers would quantize it. It skips subclasses of `nn.Linear`, which some routers are."""
    plain = type(layer.module) is nn.Linear or isinstance(layer.module, Conv1D)
    return plain and should_convert_module(layer.path, list(usual))


def _why_not(layer: Layer) -> str:
    """Why the layer is not quantized; "" = it is. A layer that can carry a LoRA is always quantized; if that cannot be
    done, the base is refused."""
    if layer.refusal in _REASONS:
        return _REASONS[layer.refusal]
    return _BLOCKS if layer.refusal and shape_of(layer.module)[1] % NF4_BLOCK else ""


def _shortest(name: str, others: Collection[str]) -> str:
    """The shortest beginning or end of a layer's name that does not make transformers skip one of the others too."""
    return next(end for end in _ends(name) if all(should_convert_module(other, [end]) for other in others))


def _ends(name: str) -> Iterator[str]:
    """Candidates, the shortest first: a whole tower, one kind of layers in all blocks, this layer alone."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()] or [len(parts)]
    yield from (".".join(parts[:length]) for length in range(1, numbers[0] + 1))
    yield from (".".join(parts[start:]) for start in range(len(parts) - 1, numbers[-1], -1))
    yield name
