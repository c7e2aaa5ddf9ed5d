"""From a bare model to an adapted one: evidence once, then each layer, then a gate.

A method that promises to leave the function alone is held to it here, on real rows, before any
training. The base weights are read and never written.
"""

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lorainit.data import Batch
from lorainit.errors import InitFailed, UnsupportedInit
from lorainit.events import Event, Message, Tick
from lorainit.evidence import Evidence
from lorainit.hardware import peak_memory_bytes
from lorainit.layer import LoRALinear, attach, disabled, weight_of
from lorainit.loss import logits_of, tally
from lorainit.methods import METHODS, Factors
from lorainit.spec import Lora, LoRAM

# How far the loss may move (nats, relative above 1) before "function-preserving" is called broken.
LOSS_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
MESSAGE_SECONDS = 5.0
NO_EVIDENCE: Mapping[str, Evidence] = MappingProxyType({})


@dataclass(frozen=True)
class Report:
    """`summary` is the object shown as `job.init_report`; `modules` has one entry per layer."""

    summary: dict[str, Any]
    modules: list[dict[str, Any]]


def initialize(
    model: nn.Module,
    targets: dict[str, nn.Module],
    lora: Lora,
    *,
    seed: int,
    probe: Batch,
    evidence: Mapping[str, Evidence] = NO_EVIDENCE,
    weight_decay: float = 0.0,
    on_event: Callable[[Event], None],
) -> Report:
    """Attach an adapter to every target of `model`.

    Args:
        lora: resolved.
        seed: the run's; used when the method has none of its own.
        probe: a few training rows, on the model's device, to measure the loss before and after.
        evidence: what `collect` gathered for the method, by module.

    Raises:
        UnsupportedInit: the method cannot work on a module; the message names it.
        InitFailed: the method moved the function although it promised not to.
    """
    started = time.monotonic()
    config = lora.method
    seed = seed if config.seed is None else config.seed
    modules: list[dict[str, Any]] = []
    said = started
    for done, (name, module) in enumerate(targets.items(), start=1):
        modules.append(_adapt(model, name, module, evidence.get(name, Evidence()), lora=lora, seed=seed))
        on_event(Tick(done=done, total=len(targets)))
        if done == len(targets) or time.monotonic() - said > MESSAGE_SECONDS:
            said = time.monotonic()
            on_event(_progress(config.method, done, len(targets)))
    seconds = time.monotonic() - started
    warnings = _warnings(lora, targets, weight_decay)
    for text in warnings:
        on_event(Message(level="warn", message=text, data={"kind": "init"}))
    report = Report(_summary(lora, seed, seconds, modules, warnings) | _measure(model, probe), modules)
    _gate(report.summary, next(iter(targets.values())))
    return report


def _progress(method: str, done: int, total: int) -> Message:
    text = f"Initializing LoRA with {method}: {done}/{total} modules"
    return Message(message=text, data={"kind": "init", "done": done, "total": total})


# --- one layer ---------------------------------------------------------------------------------


def _adapt(
    model: nn.Module, name: str, module: nn.Module, evidence: Evidence, *, lora: Lora, seed: int
) -> dict[str, Any]:
    config, s = lora.method, lora.scaling
    W = _readable_weight(name, module, needed=config.facts.needs != "none")
    try:
        factors = METHODS[config.method](
            W, evidence, rank=evidence.rank or lora.r, scale=s, config=config, generator=generator_for(seed, name)
        )
    except UnsupportedInit as error:
        raise UnsupportedInit(f"{name}: {error.message}", param=error.param) from error
    if not (factors.A.isfinite().all() and factors.B.isfinite().all()):
        raise InitFailed(f"{name}: {config.method} produced non-finite factors.", param="lora.init")
    subtract = config.offset == "subtract"
    attach(model, name, LoRALinear(module, factors, scale=s, subtract=subtract, dropout=lora.dropout))
    return _facts(name, W, factors, s=s, subtract=subtract)


def generator_for(seed: int, name: str) -> torch.Generator:
    """A module's own stream of random numbers, whatever the other modules draw before it."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _readable_weight(name: str, module: nn.Module, *, needed: bool) -> Tensor:
    """The weight as out×in float32, or the reason why no method can use it."""
    weight = weight_of(module).detach()
    if weight.is_meta:
        raise UnsupportedInit(f"{name}: the weight has not been loaded (meta tensor).", param="model")
    if not weight.is_floating_point():
        raise UnsupportedInit(f"{name}: the weight is quantized ({weight.dtype}).", param="model")
    W = weight.to(torch.float32).contiguous()
    if not W.isfinite().all():
        raise UnsupportedInit(f"{name}: the base weight has non-finite entries.", param="model")
    if needed and not W.any():
        raise UnsupportedInit(f"{name}: the base weight is zero, so there is nothing to start from.", param="model")
    return W


def _facts(name: str, W: Tensor, factors: Factors, *, s: float, subtract: bool) -> dict[str, Any]:
    A, B = factors.A.double(), factors.B.double()
    product = float(((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt())
    facts: dict[str, Any] = {
        "name": name,
        "out": W.shape[0],
        "in": W.shape[1],
        "rank": A.shape[0],
        "weight_norm": float(torch.linalg.vector_norm(W)),
        "product_norm": s * product,
    }
    if subtract:
        facts["captured_energy"] = _captured_energy(W, factors)
    return facts


def _captured_energy(W: Tensor, factors: Factors) -> float:
    """Share of ‖W‖² between the column space of B and the row space of A: ‖Q_Bᵀ·W·Q_A‖²/‖W‖²."""
    Q_B, Q_A = torch.linalg.qr(factors.B).Q, torch.linalg.qr(factors.A.T).Q
    core = Q_B.T @ W @ Q_A
    return float(torch.linalg.vector_norm(core) ** 2 / torch.linalg.vector_norm(W) ** 2)


# --- the whole ---------------------------------------------------------------------------------


def _summary(
    lora: Lora, seed: int, seconds: float, modules: list[dict[str, Any]], warnings: list[str]
) -> dict[str, Any]:
    shares = [m["captured_energy"] for m in modules if "captured_energy" in m]
    energy = {"mean": sum(shares) / len(shares), "min": min(shares), "max": max(shares)} if shares else None
    return {
        "method": lora.method.method,
        "seed": seed,
        "seconds": round(seconds, 3),
        "cached": False,
        "samples": None,
        "modules": len(modules),
        "peak_memory_bytes": peak_memory_bytes(),
        "function_preserving": lora.method.function_preserving,
        "captured_energy": energy,
        "warnings": warnings,
    }


@torch.no_grad()
def _measure(model: nn.Module, probe: Batch) -> dict[str, Any]:
    with disabled(model):
        before, base = logits_of(model, probe), tally(model, probe)
    after, initial = logits_of(model, probe), tally(model, probe)
    real = probe.attention.bool()
    return {
        "base_loss": float(base.loss) / base.tokens,
        "initial_loss": float(initial.loss) / initial.tokens,
        "max_abs_logit_difference": float((before - after)[real].abs().max()),
    }


def _gate(summary: dict[str, Any], module: nn.Module) -> None:
    """Add `checks` to the summary; refuse an adapter that does not start where it promised to."""
    base, initial = summary["base_loss"], summary["initial_loss"]
    limit = LOSS_LIMIT[weight_of(module).dtype] * max(1.0, abs(base))
    moved = abs(initial - base)
    passed = moved <= limit  # False for NaN too
    check = {"name": "initial_loss_equals_base", "passed": passed, "value": moved, "limit": limit}
    summary["checks"] = [check] if summary["function_preserving"] else []
    if summary["function_preserving"] and not passed:
        raise InitFailed(
            f"{summary['method']} promises to start as the base model, but the loss on training rows went from"
            f" {base:.4f} to {initial:.4f} (limit {limit:.2g}).",
            param="lora.init",
        )


def _warnings(lora: Lora, targets: dict[str, nn.Module], weight_decay: float) -> list[str]:
    config, s, r = lora.method, lora.scaling, lora.r
    found = []
    if config.method == "gaussian":
        n = max(weight_of(m).shape[1] for m in targets.values())
        found.append(
            f"The rows of A have norm sqrt(in)/r, up to {n**0.5 / r:.2f}, against 0.58 for kaiming whatever the"
            " layer: the best learning rate of gaussian differs and depends on r."
        )
    if isinstance(config, LoRAM) and not config.scale_aware and min(abs(s - 1), abs(s - r**0.5)) > 1e-6:
        found.append(
            f"LoRAM sizes B·A, and the scale s = {s:g} multiplies it again: the product starts at {s * s:.3g} times"
            f" the intended energy. Use alpha = r (s = 1), or alpha = r with rsLoRA (s = {r**0.5:g}), or scale_aware."
        )
    if weight_decay and config.offset == "subtract":
        found.append(
            f"With {config.method}, weight decay pulls A and B towards zero, that is towards W - s·B0·A0 and not"
            " towards the base model."
        )
    return found
