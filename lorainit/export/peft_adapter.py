"""Writes the download: a plain LoRA (or DoRA) in PEFT's file format, for every initialization.

An adapter trained in difference form is written with rank 2r, as [B, B0]·[A; -A0] at the same scale, so that it loads
on the untouched base and a loader need not know how it was initialized. A DoRA has magnitudes beside A and B, and needs
a loader that supports DoRA.

The scale is always written as alpha/r, even if the run used alpha/sqrt(r), because most loaders ignore `use_rslora` and
would silently use a wrong scale (docs/downloads.md).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lorainit.config.inits import ExportRanks
from lorainit.export import experts
from lorainit.model.layers.experts import find_stacks
from lorainit.model.layers.layer import LoRALinear
from lorainit.model.layers.weight import was_conv1d
from lorainit.model.targets.peft_support import find_rewritten

WEIGHTS = "adapter_model.safetensors"
MAGNITUDE = "lora_magnitude_vector"  # in the file; inside PEFT it is a module with a `weight`


def plain_factors(layer: LoRALinear) -> tuple[Tensor, Tensor]:
    """A' and B' with s·B'·A' = the trained difference from the base; rank r or 2r, on the CPU.

    Called layer by layer, so that no second copy of the adapter is on the device.
    """
    A, B = layer.A.detach(), layer.B.detach()
    if layer.A0 is not None and layer.B0 is not None:
        A, B = torch.cat([A, -layer.A0]), torch.cat([B, layer.B0], dim=1)
    return A.cpu(), B.cpu()


def plain_alpha(*, r: int, scale: float) -> float:
    """The `lora_alpha` for this scale and rank, as an integer if possible."""
    alpha = scale * r
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * alpha else alpha


def export(
    model: nn.Module, layers: Mapping[str, LoRALinear], folder: Path, *, root: str, ranks: ExportRanks = "padded"
) -> int:
    """Write `adapter_model.safetensors` and `adapter_config.json` into `folder`; return the (largest) rank.

    The scale is always written as alpha/r. Layers of rank 0 are left out.

    Args:
        model: the model of the layers, with or without them attached.
        root: the base model's public name, under which stock PEFT looks for it.
        ranks: "padded" = zeros up to the largest rank, so that one rank and one alpha hold for all layers; "pattern"
            = every layer at its own rank, in PEFT's rank and alpha patterns.
    """
    layers = {name: layer for name, layer in layers.items() if len(layer.A)}
    factors = {name: plain_factors(layer) for name, layer in layers.items()}
    if ranks == "padded":
        largest = max(len(A) for A, _ in factors.values())
        factors = {name: _padded(A, B, largest) for name, (A, B) in factors.items()}
    packed = experts.pack({name: layer for name, layer in layers.items() if experts.are_experts(layer)}, factors)
    layers = {name: layer for name, layer in layers.items() if not experts.are_experts(layer)}
    tensors: dict[str, Tensor] = {}
    for pair in packed.values():
        tensors[f"base_model.model.{pair.prefix}.lora_A.weight"] = pair.A
        tensors[f"base_model.model.{pair.prefix}.lora_B.weight"] = pair.B
    for name in layers:
        A, B = factors[name]
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B.cpu().contiguous()
        magnitude = layers[name].magnitude
        if magnitude is not None:
            tensors[f"base_model.model.{name}.{MAGNITUDE}"] = magnitude.detach().cpu().contiguous()
    config = _config(model, layers, packed, {name: len(factors[name][0]) for name in layers}, root=root)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(sorted(tensors.items())), folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", config)
    return int(config["r"])


def _padded(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same product at a higher rank, padded with zeros."""
    missing = rank - len(A)
    return nn.functional.pad(A, (0, 0, 0, missing)), nn.functional.pad(B, (0, missing))


def _config(
    model: nn.Module,
    layers: Mapping[str, LoRALinear],
    packed: Mapping[str, experts.Packed],
    ranks: Mapping[str, int],
    *,
    root: str,
) -> dict[str, Any]:
    """`adapter_config.json` with only the keys that a loader needs, because older PEFT refuses unknown keys."""
    ranks = {**ranks, **{name: pair.rank for name, pair in packed.items()}}
    scales = {name: x.scale for part in (layers, packed) for name, x in part.items()}
    alphas = {name: plain_alpha(r=r, scale=scales[name]) for name, r in ranks.items()}
    # `r` is the largest rank, because loaders reserve memory by it. Layers of another rank are in `rank_pattern`.
    largest = max(ranks, key=lambda name: ranks[name])
    # PEFT would take these dense layers for experts, so their weights are named as parameters. The tensors' names in
    # the file stay the same.
    weights = {name: f"{name}.weight" for name in find_rewritten(model, list(layers))}
    parameters = _parameter_names(model, set(packed)) + sorted(weights.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": root,
        "inference_mode": True,
        "r": ranks[largest],
        "lora_alpha": alphas[largest],
        "lora_dropout": 0.0,
        "target_modules": _target_names(model, set(layers) - set(weights)),
        **({"target_parameters": parameters} if parameters else {}),
        "fan_in_fan_out": any(was_conv1d(layer.base) for layer in layers.values()),
        "bias": "none",
        "use_rslora": False,
        "use_dora": any(layer.magnitude is not None for layer in layers.values()),
        "rank_pattern": {weights.get(name, name): r for name, r in ranks.items() if r != ranks[largest]},
        "alpha_pattern": {weights.get(name, name): a for name, a in alphas.items() if a != alphas[largest]},
    }


def _target_names(model: nn.Module, names: set[str]) -> list[str]:
    """Short suffixes if they match exactly these layers, because most loaders understand them; else full names."""
    suffixes, ours = {name.rpartition(".")[2] for name in names}, tuple(find_stacks(model))
    everything = {name.removesuffix(".base") for name, _ in model.named_modules() if not name.startswith(ours or "\0")}
    matched = {name for name in everything if name.rpartition(".")[2] in suffixes}
    return sorted(suffixes if matched == names else names)


def _parameter_names(model: nn.Module, names: set[str]) -> list[str]:
    """The last two parts of the 3-D parameters' names if these match exactly these parameters, else full names."""
    suffixes = {".".join(name.split(".")[-2:]) for name in names}
    matched = {name for name in find_stacks(model) if ".".join(name.split(".")[-2:]) in suffixes}
    return sorted(suffixes if matched == names else names)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON with a final newline. NaN raises an error, because it is not valid JSON."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
