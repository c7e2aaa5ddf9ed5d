"""Measures how much of the learned change is left when an adapter is served in different ways.

bf16 has eight significant bits. An update that is smaller than half a step of the number it is added to disappears
when the sum is rounded. This happens at each layer's output if the adapter is served unmerged, and in each weight if
it is merged. The losses of held-out rows show how much it costs (docs/precision.md). Uses the base model's files, the
exported adapter and stock PEFT only, so that it measures what a user would get.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from lorainit.config.events import Message, OnEvent, Tick
from lorainit.config.inits import Quantization
from lorainit.data.dataset import Dataset, Sample
from lorainit.export.check import load_with_stock_peft
from lorainit.model.layers.weight import was_conv1d, weight_of
from lorainit.model.load import free_model, load_model
from lorainit.model.targets.targets import find_linear_layers
from lorainit.runtime.devices import has_bf16

Way = Literal["unmerged", "merged"]

# SmolLM2-135M on one CPU core: six passes over 1024 tokens take about 14 s (3.4 s in fp32, 1.1 s in bf16).
MAX_ROWS, MAX_TOKENS = 32, 1024
TOLERATED = 0.1  # share of the gain that may be lost without a warning
MAX_ERROR = 0.25  # standard error of a kept share; above it the share is not reported, because it would mislead

_WAYS: tuple[Way, ...] = ("unmerged", "merged")
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_LOSSES = ("base", "trained", "merged_fp32", "base_bf16", "unmerged_bf16", "merged_bf16")
_NO_ROWS = f"no row has a trained token among its last {MAX_TOKENS} tokens"
_NO_BF16 = "this device has no bf16"
_NOT_FP32 = "the run is not in fp32"
_QUANTIZED = "merging needs the full-precision base, and the adapter was trained on the base in four bits"
DIVIDED = "the base is divided between devices"
_NO_GAIN = "the training did not lower the loss of these rows"
_PHRASES: dict[Way, str] = {
    "unmerged": "when served unmerged on a bf16 base",
    "merged": "when merged in fp32 and cast to bf16",
}
_SERVE_FP32 = "Serve it in fp32, merged or not."
_ADVICE: dict[Way, str] = {  # by the way of serving that loses, if only one of them does
    "unmerged": "Merge it into the base model in fp32 before casting, or serve it in fp32.",
    "merged": "Serve it unmerged, or in fp32.",
}


@dataclass(frozen=True)
class HeldOut:
    """Rows to measure on: the first rows of the validation file, or of the training file if there is none."""

    source: Literal["validation", "training"]
    samples: list[Sample]


def choose_held_out(training: Dataset, validation: Dataset | None) -> HeldOut:
    """Choose at most `MAX_ROWS` rows and `MAX_TOKENS` tokens. A row that is too long keeps its end, because the answer
    is there."""
    chosen: list[Sample] = []
    left = MAX_TOKENS
    for sample in (validation or training).samples:
        part = Sample(sample.line, sample.ids[-left:], sample.trained[-left:])
        if part.trained[1:].any():
            chosen.append(part)
            left -= len(part.ids)
        if len(chosen) == MAX_ROWS or not left:
            break
    return HeldOut("validation" if validation else "training", chosen)


@torch.no_grad()
def measure_token_losses(model: nn.Module, rows: HeldOut, *, on_event: OnEvent) -> Tensor:
    """The loss of every trained token in nats, float64 on the CPU. Each row has a pass of its own, without padding."""
    device = next(model.parameters()).device
    losses = []
    for done, sample in enumerate(rows.samples, start=1):
        ids, wanted = sample.ids.long().to(device), sample.trained[1:].to(device)
        logits = model(input_ids=ids[None]).logits[0, :-1][wanted].float()
        losses.append(F.cross_entropy(logits, ids[1:][wanted], reduction="none").cpu())
        on_event(Tick(done=done, total=len(rows.samples)))
    return torch.cat(losses).double() if losses else torch.empty(0, dtype=torch.float64)


# --- ways of serving ----------------------------------------------------------------------------


def _wanted(
    *, dtype: torch.dtype, device: torch.device, quantization: Quantization | None
) -> dict[torch.dtype, list[Way]]:
    """Which ways of serving are measured in which number format. The run's own format comes first, because its base
    losses are the reference."""
    merged: list[Way] = [] if quantization else ["merged"]
    wanted = {dtype: merged}
    if has_bf16(device):
        wanted[torch.bfloat16] = ["unmerged", *merged]
    return wanted


def _serve(model: Any, base_folder: Path, rows: HeldOut, *, ways: list[Way], on_event: OnEvent) -> dict[str, Tensor]:
    """The losses of a model with stock PEFT for each way of serving, and of its base. The model is freed afterwards."""
    with model.disable_adapter():
        losses = {"base": measure_token_losses(model, rows, on_event=on_event)}
    if "unmerged" in ways:
        losses["unmerged"] = measure_token_losses(model, rows, on_event=on_event)
    if "merged" in ways:
        _merge(model, base_folder, on_event=on_event)
        with model.disable_adapter():
            losses["merged"] = measure_token_losses(model, rows, on_event=on_event)
    free_model(model)
    return losses


@torch.no_grad()
def _merge(model: nn.Module, base_folder: Path, *, on_event: OnEvent) -> None:
    """Put W + s·B·A into the layers below the adapter: computed in float32 from the files, then rounded once.

    Layer by layer, because a base that fits the device in bf16 may not fit there in float32.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    stored = load_model(base_folder, dtype="auto", device=torch.device("cpu"))
    originals = find_linear_layers(stored)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for done, (name, layer) in enumerate(layers.items(), start=1):
        base: Any = layer.get_base_layer()
        if isinstance(layer, ParamWrapper) and layer.get_param().ndim > 2:
            of = stored.get_submodule(name.removeprefix("base_model.model.").replace(".base_layer", ""))
            _merge_experts(layer, getattr(of, layer.parameter_name))
            on_event(Tick(done=done, total=len(layers)))
            continue
        W = weight_of(originals[name.removeprefix("base_model.model.")]).to(base.weight.device, torch.float32)
        merged = _merged(layer, W)
        merged = merged.T if was_conv1d(base) else merged
        # A new tensor, because the old one may be mapped from the files or shared with another layer.
        base.weight = nn.Parameter(merged.to(base.weight.dtype), requires_grad=False)
        on_event(Tick(done=done, total=len(layers)))


def _merge_experts(layer: Any, stored: Tensor) -> None:
    """The same for all experts of one 3-D parameter, one after the other. PEFT knows if its pairs are transposed."""
    old, s = layer.get_param(), layer.scaling["default"]
    A, B = (part["default"].weight.float() for part in (layer.lora_A, layer.lora_B))
    merged = torch.empty_like(old)
    for number, (a, b) in enumerate(zip(A.chunk(len(old)), B.unflatten(1, (-1, len(old))).unbind(2), strict=True)):
        update = s * b @ a
        update = update if layer._did_swap_in_out_features else update.T  # else the base stores in×out
        merged[number] = stored[number].to(old.device, torch.float32) + update
    setattr(layer.get_base_layer(), layer.parameter_name, nn.Parameter(merged, requires_grad=False))


def _merged(layer: Any, W: Tensor) -> Tensor:
    """W + s·B·A, or with DoRA's magnitudes m ⊙ (W + s·B·A)/‖W + s·B·A‖; float32, out×in."""
    A, B = (part["default"].weight.float() for part in (layer.lora_A, layer.lora_B))
    merged: Tensor = W + layer.scaling["default"] * B @ A
    if "default" not in layer.lora_magnitude_vector:
        return merged
    magnitude = layer.lora_magnitude_vector["default"].weight.float()
    merged *= (magnitude / torch.linalg.vector_norm(merged, dim=1))[:, None]
    return merged


# --- the measurement ----------------------------------------------------------------------------


def measure(
    base_folder: Path,
    folder: Path,
    rows: HeldOut,
    trained: Tensor,
    *,
    dtype: torch.dtype,
    device: torch.device,
    on_event: OnEvent,
    quantization: Quantization | None = None,
    served: nn.Module | None = None,
) -> dict[str, Any]:
    """Measure, emit one `Message` (a warning if a way of serving loses much) and return the facts.

    The trained model should have been freed before, because this needs memory for one copy of the base and one layer.

    Args:
        folder: the adapter as `adapter.export` wrote it.
        trained: `measure_token_losses` of the trained model on the same rows.
        dtype: the run's format of base and activations.
        served: the adapter on a base in this format, if stock PEFT has loaded it already; it is freed.

    Returns:
        `job.export_check["fidelity"]`. Losses are nats per trained token; `kept_*` is the share of the gain
        that is left with a way of serving, `*_error` its standard error. For each None there is a reason in `missing`.
    """
    started = time.monotonic()
    found: dict[str, Tensor] = {"trained": trained} if rows.samples else {}
    wanted = _wanted(dtype=dtype, device=device, quantization=quantization) if rows.samples else {}
    for number, ways in wanted.items():
        model = served if number == dtype else None
        if model is None:
            base = load_model(base_folder, dtype=number, device=device, quantization=quantization)
            model = load_with_stock_peft(base, folder)
        losses = _serve(model, base_folder, rows, ways=ways, on_event=on_event)
        if number == dtype:
            found["base"] = losses["base"]
        found |= {f"{way}_{_NAMES[number]}": some for way, some in losses.items()}
    if served is not None:
        free_model(served)
    facts = {
        "data": rows.source,
        "rows": len(rows.samples),
        "tokens": len(trained),
        "precision": _NAMES[dtype],
        **_facts(found, quantized=quantization is not None),
        "seconds": round(time.monotonic() - started, 2),
    }
    _tell(facts, on_event)
    return facts


def report_unmeasured(rows: HeldOut, *, dtype: torch.dtype, reason: str, on_event: OnEvent) -> dict[str, Any]:
    """Return the facts of a run for which nothing can be measured, and emit a message that says so."""
    losses = [f"{name}_loss" for name in _LOSSES]
    kept = [f"kept_{way}_bf16" for way in _WAYS]
    facts: dict[str, Any] = dict.fromkeys([*losses, *kept, *(f"{name}_error" for name in kept)])
    facts |= {"data": rows.source, "rows": 0, "tokens": 0, "precision": _NAMES[dtype], "seconds": 0.0}
    facts["missing"] = dict.fromkeys([*losses, *kept], reason)
    _tell(facts, on_event)
    return facts


def _facts(found: dict[str, Tensor], *, quantized: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name in _LOSSES:
        facts[f"{name}_loss"] = float(found[name].mean()) if name in found else None
        if name not in found:
            missing[f"{name}_loss"] = _reason(name, rows="trained" in found, quantized=quantized)
    for way in _WAYS:
        kept = missing.get(f"{way}_bf16_loss") or _kept(found, f"{way}_bf16")
        share, error = (None, None) if isinstance(kept, str) else kept
        facts |= {f"kept_{way}_bf16": share, f"kept_{way}_bf16_error": error}
        if isinstance(kept, str):
            missing[f"kept_{way}_bf16"] = kept
    return {**facts, "missing": missing}


def _reason(name: str, *, rows: bool, quantized: bool) -> str:
    if not rows:
        return _NO_ROWS
    if quantized and name.startswith("merged"):
        return _QUANTIZED
    return _NO_BF16 if name.endswith("bf16") else _NOT_FP32


def _kept(found: dict[str, Tensor], way: str) -> tuple[float, float] | str:
    """The share of the gain that is left in bf16 and its standard error, or the reason why it is not reported.

    Each gain is relative to the base in the same format, so that the base's own rounding does not count. The error is
    the standard error of the mean difference between the two gains of each token. It covers rounding, which changes
    every token a little, and the choice of the rows.
    """
    learned, shown = found["base"] - found["trained"], found["base_bf16"] - found[way]
    gain = float(learned.mean())
    if gain <= 0:
        return _NO_GAIN
    error = float((shown - learned).std()) / len(learned) ** 0.5 / gain if len(learned) > 1 else float("inf")
    if error > MAX_ERROR:
        return f"a gain of {gain:.2g} nats is too small to tell from rounding and noise on {len(learned)} tokens"
    return float(shown.mean()) / gain, error


# --- the sentence -------------------------------------------------------------------------------


def _tell(facts: dict[str, Any], on_event: OnEvent) -> None:
    shares = {way: facts[f"kept_{way}_bf16"] for way in _WAYS if facts[f"kept_{way}_bf16"] is not None}
    # Only if it loses too much even with two standard errors added, so that noise causes no warning.
    lossy = [way for way, share in shares.items() if share + 2 * facts[f"kept_{way}_bf16_error"] < 1 - TOLERATED]
    if lossy:
        text = f"{_shown({way: shares[way] for way in lossy})}: its updates are smaller than bf16 can hold. "
        text += _SERVE_FP32 if len(lossy) == len(shares) else _ADVICE[lossy[0]]
    elif shares:
        text = f"{_shown(shares)}."
    else:
        text = f"What serving in bf16 would keep was not measured: {facts['missing']['kept_unmerged_bf16']}."
    data = {"kind": "export", "fidelity": facts}
    on_event(Message.model_validate({"level": "warn" if lossy else "info", "message": text, "data": data}))


def _shown(shares: dict[Way, float]) -> str:
    parts = [f"{share:.0%} {_PHRASES[way]}" for way, share in shares.items()]
    return f"Of what it learned the adapter shows {' and '.join(parts)}"
