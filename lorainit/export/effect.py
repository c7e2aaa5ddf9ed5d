"""Measures what an adapter does to each layer and to the model's logits, to compare it with a reloaded adapter.

Each layer gets fixed inputs and computes in float64, so that what the adapter adds is known to ten digits even if it
was trained very little.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorainit.config.events import OnEvent, Tick
from lorainit.export.float64 import compute_in, find_widest_dtype, make_plain_linear, widen_weights
from lorainit.model.layers.experts import ExpertLinear
from lorainit.model.layers.layer import LoRALinear, attach_temporarily
from lorainit.runtime.devices import make_generator

NOTHING = 1e-12  # relative to the largest logit: rounding errors of float64 where terms cancel
ROWS = 2  # inputs for each layer; one is enough in theory, but could by chance hide a difference


@dataclass(frozen=True)
class Change:
    """One layer's outputs for its fixed inputs, rows×out, float32 on the CPU.

    `base`: without the adapter; `added`: what the adapter adds. `transposed`: the base stores this expert's matrix
    as in×out.
    """

    base: Tensor
    added: Tensor
    transposed: bool = False


@dataclass(frozen=True)
class Effect:
    """What an adapter does to a model.

    Attributes:
        changes: one `Change` for each layer, by the base's module names.
        logits: the adapted model's logits for each text, tokens×vocabulary, float64 on the CPU.
        moved: the largest difference between each token's logits and the base's, one tensor for each text.
        dtype: the format in which `logits` were computed; widened: it is a wider format than the run's own.
        noise: the error that the run's own format makes in this effect, relative to it; None if it makes none.
    """

    changes: dict[str, Change]
    texts: list[Tensor]
    logits: list[Tensor]
    moved: list[Tensor]
    dtype: torch.dtype
    widened: bool
    noise: float | None

    @property
    def absent(self) -> bool:
        """Whether the model's logits are the same with the adapter and without it."""
        largest = max(float(logits.abs().max()) for logits in self.logits)
        return not max(float(moved.max()) for moved in self.moved) > NOTHING * largest


def observe(
    model: nn.Module, layers: dict[str, LoRALinear], texts: list[Tensor], *, divided: bool, on_event: OnEvent
) -> Effect:
    """Measure what `layers` do to `model`, which must not carry any of them.

    Args:
        divided: the base is sharded. Its layers are measured in float64, but its logits in the run's own format,
            because sharded parameters are not converted.
    """
    changes = observe_layers(layers, on_event=on_event)
    own = next(p.dtype for p in model.parameters() if p.is_floating_point())
    dtype = None if divided else find_widest_dtype(model, texts[0])
    bare, adapted = _both(model, layers, texts, dtype, on_event=on_event)
    noise = None
    if dtype and own.itemsize < torch.float32.itemsize:
        noise = _distance(*_both(model, layers, texts, None, on_event=on_event), bare, adapted)
    return Effect(changes, texts, adapted, _moved(bare, adapted), dtype or own, dtype is not None, noise)


@torch.no_grad()
def observe_layers(layers: Mapping[str, LoRALinear], *, on_event: OnEvent) -> dict[str, Change]:
    """What each of our layers does. Layers of rank 0 are left out, because they do nothing and are not exported."""
    found = {}
    for done, (name, layer) in enumerate(layers.items(), start=1):
        if len(layer.A):
            found[name] = _change(name, layer, layer.A.shape[1])
        on_event(Tick(done=done, total=len(layers)))
    return found


def _change(name: str, layer: LoRALinear, width: int) -> Change:
    base, x = layer.base, fixed_rows(name, width).to(layer.A.device)
    try:
        layer.base = make_plain_linear(base, torch.float64)
        with widen_weights(layer, torch.float64):
            y: Tensor = layer.base(x)
            return _as_change(y, layer(x), transposed=isinstance(base, ExpertLinear) and base.stack.transposed)
    finally:
        layer.base = base


def observe_peft(model: nn.Module, ours: Mapping[str, Change]) -> Iterator[tuple[str, Change]]:
    """What each of PEFT's layers does to the same inputs, by the base's module names."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    for name, layer in model.named_modules():
        # A parameter of two dimensions is a linear layer's weight (`peft_support.find_rewritten`), so the layer can be
        # called.
        if isinstance(layer, ParamWrapper) and layer.get_param().ndim > 2:
            yield from _experts(f"{name.replace('.base_layer', '')}.{layer.parameter_name}", layer, ours)
        elif isinstance(layer, LoraLayer):
            yield name, _of_peft(name, layer)


@torch.no_grad()
def _of_peft(name: str, layer: Any) -> Change:
    A = layer.lora_A["default"].weight
    x = fixed_rows(name, A.shape[1]).to(A.device)
    with widen_weights(layer, torch.float64):
        return _as_change(layer.base_layer(x), layer(x))


@torch.no_grad()
def _experts(name: str, layer: Any, ours: Mapping[str, Change]) -> list[tuple[str, Change]]:
    """What PEFT does to each expert of an adapted parameter.

    Experts that we did not adapt are left out, unless PEFT changes them, so that such a change is found.
    """
    found = []
    with widen_weights(layer, torch.float64):
        stored, (left, right, scale) = _whole(layer.get_param()), layer.get_delta_factors("default")
        bias = getattr(layer.get_base_layer(), f"{layer.parameter_name}_bias", None)
        bias = None if bias is None else _whole(bias)
        for number, (W, L, R) in enumerate(zip(stored, left, right, strict=True)):
            one = f"{name}.{number}"
            transposed = one in ours and ours[one].transposed
            if one not in ours and not (L.any() and R.any()):
                continue
            L, R = L.to(W.dtype), R.to(W.dtype)  # PEFT gives them the format of the parameter
            W, L, R = (W.T, R.T, L.T) if transposed else (W, L, R)
            x = fixed_rows(one, W.shape[1]).to(W.device)
            base = x @ W.T
            base = base if bias is None else base + bias[number]
            found.append((one, Change(base.float().cpu(), (scale * x @ R.T @ L.T).float().cpu(), transposed)))
    return found


def _whole(parameter: Any) -> Tensor:
    """The whole parameter in float64. If it is sharded, all processes must call this together."""
    found: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return found.to(torch.float64)


def _as_change(base: Tensor, adapted: Tensor, *, transposed: bool = False) -> Change:
    # Subtracted in float64 and rounded afterwards, because what was added may be smaller than float32's last digit of
    # the sum.
    return Change(base.float().cpu(), (adapted - base).float().cpu(), transposed)


def fixed_rows(name: str, width: int) -> Tensor:
    """Normal numbers (rows×width, float64) that depend on the layer's name only."""
    return torch.randn(ROWS, width, generator=make_generator(0, name), dtype=torch.float64)


# --- logits --------------------------------------------------------------------------------------


@torch.no_grad()
def logits_of(model: Any, texts: Sequence[Tensor], *, dtype: torch.dtype | None, on_event: OnEvent) -> list[Tensor]:
    """The model's logits for each text in a pass of its own, computed in `dtype` (None = as it is); float64, CPU."""
    if dtype is not None:
        with compute_in(model, dtype):
            return logits_of(model, texts, dtype=None, on_event=on_event)
    device, found = next(model.parameters()).device, []
    for done, ids in enumerate(texts, start=1):
        found.append(model(input_ids=ids[None].to(device)).logits[0].double().cpu())
        on_event(Tick(done=done, total=len(texts)))
    return found


def _both(
    model: nn.Module,
    layers: dict[str, LoRALinear],
    texts: Sequence[Tensor],
    dtype: torch.dtype | None,
    *,
    on_event: OnEvent,
) -> tuple[list[Tensor], list[Tensor]]:
    """The logits of the bare model and of the adapted one."""
    bare = logits_of(model, texts, dtype=dtype, on_event=on_event)
    with attach_temporarily(model, layers):
        return bare, logits_of(model, texts, dtype=dtype, on_event=on_event)


def _moved(bare: Sequence[Tensor], adapted: Sequence[Tensor]) -> list[Tensor]:
    return [(a - b).abs().amax(1) for a, b in zip(adapted, bare, strict=True)]


def _distance(
    bare: Sequence[Tensor], adapted: Sequence[Tensor], exactly_bare: Sequence[Tensor], exactly: Sequence[Tensor]
) -> float | None:
    """The distance between an effect on logits and the exact one, relative to the exact one; None if that is zero."""
    effect = [a - b for a, b in zip(exactly, exactly_bare, strict=True)]
    off = [(a - b) - e for a, b, e in zip(adapted, bare, effect, strict=True)]
    size = norm_of(effect)
    return norm_of(off) / size if size else None


def norm_of(tensors: Sequence[Tensor]) -> float:
    """The Euclidean norm of all numbers of several tensors."""
    return math.sqrt(math.fsum(float(t.square().sum()) for t in tensors))
