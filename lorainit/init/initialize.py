"""Attaches an adapter to every target of a model, and checks the result.

If a method promises not to change the model's function, this is measured on training rows before any training, so
that a wrong start is found at once. The base weights are read and never written.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lorainit.config.errors import InitFailed, UnsupportedInit
from lorainit.config.events import Event, Message, Tick
from lorainit.config.inits import InitConfig
from lorainit.config.inits.plain import Kaiming
from lorainit.config.spec import Lora
from lorainit.context import Report
from lorainit.data.batches import Batch
from lorainit.init import report
from lorainit.init.evidence import Evidence
from lorainit.init.methods import METHODS
from lorainit.init.norms import row_norms
from lorainit.model.layers.factors import Factors
from lorainit.model.layers.layer import LoRALinear, adapted_layers, attach
from lorainit.model.layers.weight import shape_of, weight_of
from lorainit.runtime.devices import make_generator

MESSAGE_SECONDS = 5.0  # between two messages about progress, so that a model with many layers does not send hundreds
# DoRA refuses rows of a weight with a smaller norm, because their squares are zero in float32, in PEFT's DoRA as in
# ours.
DORA_ROW = 1e-18
NO_EVIDENCE: Mapping[str, Evidence] = MappingProxyType({})


@dataclass(frozen=True)
class CachedStart:
    """One layer's start, computed by an earlier run: its factors and its entry in the report."""

    factors: Factors
    facts: dict[str, Any]


def initialize(
    model: nn.Module,
    targets: dict[str, nn.Module],
    lora: Lora,
    *,
    seed: int,
    probe: Batch,
    on_event: Callable[[Event], None],
    evidence: Mapping[str, Evidence] = NO_EVIDENCE,
    known: Mapping[str, CachedStart] | None = None,
    calibration: Sequence[Batch] = (),
    weight_decay: float = 0.0,
    rate: float = 0.0,
    started: float | None = None,
    cached: bool = False,
) -> Report:
    """Attach an adapter to every target of `model`.

    Args:
        lora: with every option resolved.
        seed: the run's seed; used if the method has no seed of its own.
        probe: a few training rows on the model's device, to measure the loss before and after.
        evidence: what `collect` returned for the method, by module.
        known: the starts of all targets from the cache; None = compute them.
        calibration: the method's rows. The loss of a displaced start is measured on them too.
        weight_decay: the run's; only for a warning.
        rate: the peak learning rate, from which the report estimates the loss change of the first step.
        started: `time.monotonic()` when evidence collection began, so that the reported time includes it.
        cached: whether evidence or factors came from the cache.

    Raises:
        UnsupportedInit: the method cannot work on a module; the message names it.
        InitFailed: the factors are not finite, the method changed the model's function although it promises not to, or
            the loss is not finite after it.
    """
    started = time.monotonic() if started is None else started
    config = lora.method
    drawn_from = config.seed_for(seed)
    modules: list[dict[str, Any]] = []
    said = time.monotonic()
    for done, (name, module) in enumerate(targets.items(), start=1):
        found = known[name] if known else None
        evidence_of = evidence.get(name, Evidence())
        modules.append(_adapt(model, name, module, evidence_of, lora=lora, seed=drawn_from, known=found))
        on_event(Tick(done=done, total=len(targets)))
        if done == len(targets) or time.monotonic() - said > MESSAGE_SECONDS:
            said = time.monotonic()
            on_event(_progress(config.method, done, len(targets)))
    seconds = time.monotonic() - started
    summary = report.summarize(
        lora, modules, seed=seed if config.seed is None else config.seed, seconds=seconds, cached=cached, rate=rate
    )
    trained = (p for layer in adapted_layers(model).values() for p in layer.parameters() if p.requires_grad)
    summary["trainable_parameters"] = sum(p.numel() for p in trained)
    summary |= report.measure(model, probe)
    warnings = _warnings(lora, targets, modules, weight_decay)
    if not config.function_preserving:
        rows = calibration or [probe]
        tick = iter(range(1, 2 * len(rows) + 1))
        loss = report.measure_displacement(
            model, rows, tick=lambda: on_event(Tick(done=next(tick), total=2 * len(rows)))
        )
        summary["calibration_loss"] = loss
        warnings += _rise(config, loss)
    for text in warnings:
        on_event(Message(level="warn", message=text, data={"kind": "init"}))
    summary["warnings"] = warnings
    report.check_start(summary, model)
    return Report(summary, modules)


def _progress(method: str, done: int, total: int) -> Message:
    text = f"Initializing LoRA with {method}: {done}/{total} modules"
    return Message(message=text, data={"kind": "init", "done": done, "total": total})


# --- one layer ---------------------------------------------------------------------------------


def _adapt(
    model: nn.Module,
    name: str,
    module: nn.Module,
    evidence: Evidence,
    *,
    lora: Lora,
    seed: int,
    known: CachedStart | None,
) -> dict[str, Any]:
    config, s = lora.method, lora.scaling
    W = _readable_weight(name, module, needed=config.facts.needs != "none", dora=lora.use_dora)
    if known:
        factors = Factors(A=known.factors.A.to(W.device), B=known.factors.B.to(W.device))
    else:
        factors = _factors(name, W, evidence, lora=lora, seed=seed)
    if not (factors.A.isfinite().all() and factors.B.isfinite().all()):
        raise InitFailed(f"{name}: {config.method} produced non-finite factors.", param="lora.init")
    subtract = config.offset == "subtract"
    layer = LoRALinear(module, factors, scale=s, subtract=subtract, dropout=lora.dropout, dora=lora.use_dora)
    attach(model, name, layer)
    if known:
        return known.facts
    return report.describe_layer(name, W, factors, evidence, s=s, lora=lora, magnitude=layer.magnitude)


def _factors(name: str, W: Tensor, evidence: Evidence, *, lora: Lora, seed: int) -> Factors:
    config = Kaiming(method="kaiming") if evidence.starved else lora.method
    rank = lora.r if evidence.rank is None else evidence.rank
    # The generator depends on the layer's name, so that a layer's random numbers do not depend on the other targets.
    try:
        return METHODS[config.method](
            W, evidence, rank=rank, scale=lora.scaling, config=config, generator=make_generator(seed, name)
        )
    except (UnsupportedInit, InitFailed) as error:
        raise type(error)(f"{name}: {error.message.removeprefix(f'{name}: ')}", param=error.param) from error


def _readable_weight(name: str, module: nn.Module, *, needed: bool, dora: bool) -> Tensor:
    """The weight as out×in in float32.

    Args:
        needed: the method reads the weight, so a weight of zeros is refused.
        dora: a row of zeros is refused too, because DoRA divides by its norm.

    Raises:
        UnsupportedInit: no method, or not this one, can use the weight.
    """
    weight = weight_of(module).detach()
    if weight.is_meta:
        raise UnsupportedInit(f"{name}: the weight has not been loaded (meta tensor).", param="model")
    if not weight.is_floating_point():
        raise UnsupportedInit(f"{name}: the weight is quantized ({weight.dtype}).", param="model")
    W = weight.to(torch.float32).contiguous()
    norms = row_norms(W)  # shows non-finite entries and zeros in one pass over W, without a mask as large as W
    if not norms.isfinite().all():
        raise UnsupportedInit(f"{name}: the base weight has non-finite entries.", param="model")
    if needed and not norms.any():
        raise UnsupportedInit(f"{name}: the base weight is zero, so there is nothing to start from.", param="model")
    if dora and not (alive := norms > DORA_ROW).all():
        raise UnsupportedInit(
            f"{name}: {int((~alive).sum())} rows of the base weight are zero, or nearly, and have no direction for"
            " DoRA to keep: leave this module out or use plain LoRA.",
            param="lora.use_dora",
        )
    return W


# --- warnings ------------------------------------------------------------------------------------


def _rise(config: InitConfig, loss: dict[str, Any]) -> list[str]:
    if loss["after"] <= loss["before"]:
        return []
    return [
        f"{config.facts.title} starts away from the base model, and that made it worse: the loss on {loss['rows']}"
        f" calibration rows rose from {loss['before']:.4f} to {loss['after']:.4f}. {config.remedy}"
    ]


def _starved(lora: Lora, modules: Sequence[dict[str, Any]]) -> list[str]:
    names = [m["name"] for m in modules if m.get("start") == "kaiming"]
    if not names:
        return []
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return [
        f"Too few tokens were routed to {len(names)} of {len(modules)} matrices for {lora.method.method} to start"
        f" from: {shown}. These experts start as kaiming does, from a product of zero. More or longer rows reach more."
    ]


def _warnings(
    lora: Lora, targets: dict[str, nn.Module], modules: Sequence[dict[str, Any]], weight_decay: float
) -> list[str]:
    config, r = lora.method, lora.r
    widest = max(shape_of(m)[1] for m in targets.values())
    found = _starved(lora, modules) + config.warnings(r=r, scale=lora.scaling, widest=widest)
    dead = [m["name"] for m in modules if m.get("first_step_slope") == 0]
    if dead:
        found.append(
            f"The gradient of {len(dead)} modules is zero, {dead[0]} among them: it does not tell them how to start."
        )
    poor = {m["name"]: m["gradient_rank"] for m in modules if "gradient_rank" in m}
    if poor:
        name, rank = min(poor.items(), key=lambda item: item[1])
        wanted = f"r = {r}" if config.smaller_side(r) == r else f"2r = {2 * r}"
        found.append(
            f"The gradient of {len(poor)} modules has fewer directions than {config.method} takes ({wanted}), down to"
            f" {rank} in {name}: the others carry no gradient. More calibration rows, or a smaller r."
        )
    if weight_decay and config.offset == "subtract":
        found.append(
            f"With {config.method}, weight decay pulls A and B towards zero, that is towards W - s·B0·A0 and not"
            " towards the base model."
        )
    return found
