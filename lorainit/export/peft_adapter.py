"""The download: a plain LoRA (or DoRA) in PEFT's file format, whichever method made it, and the proof of it.

An adapter trained in difference form is written as rank 2r: [B, B0]·[A; -A0] at the same scale, so
it loads on the untouched base without knowing how it was initialized. With DoRA the magnitudes come
beside A and B: such an adapter is no pure pair, and needs a loader that knows DoRA.
"""

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorainit.data import Sample
from lorainit.errors import ExportCheckFailed
from lorainit.events import Event, Tick
from lorainit.inits import Quantization
from lorainit.layer import LoRALinear
from lorainit.model.load import free
from lorainit.model.targets import linear_layers
from lorainit.weight import was_conv1d

WEIGHTS = "adapter_model.safetensors"
MAGNITUDE = "lora_magnitude_vector"  # in the file; inside PEFT it is a module with a `weight`
MAX_PROMPTS, PROMPT_TOKENS = 16, 64
# Largest logit difference that is rounding, relative to the largest logit (at least 1). In bf16 PEFT rounds
# both branches before it adds them, which we do not.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


# --- writing -----------------------------------------------------------------------------------


def plain_factors(layer: LoRALinear) -> tuple[Tensor, Tensor]:
    """A' and B' with s·B'·A' = the trained difference from the base; rank r or 2r."""
    A, B = layer.A.detach(), layer.B.detach()
    if layer.A0 is None or layer.B0 is None:
        return A, B
    return torch.cat([A, -layer.A0]), torch.cat([B, layer.B0], dim=1)


def plain_alpha(*, r: int, scale: float, rslora: bool) -> float:
    """The `lora_alpha` that gives this scale at this rank; an integer where it is one."""
    alpha = scale * (r**0.5 if rslora else r)
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * alpha else alpha


def export(model: nn.Module, layers: Mapping[str, LoRALinear], folder: Path, *, root: str, rslora: bool) -> int:
    """Write `adapter_model.safetensors` and `adapter_config.json` into `folder`; return the (largest) rank.

    Layers of rank 0 are left out; other ranks than the largest become PEFT's rank and alpha patterns.

    Args:
        model: what the layers belong to, with or without them in their places.
        root: the base model's public name, as stock PEFT will look for it.
    """
    layers = {name: layer for name, layer in layers.items() if len(layer.A)}
    factors = {name: plain_factors(layer) for name, layer in layers.items()}
    tensors: dict[str, Tensor] = {}
    for name, (A, B) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B.cpu().contiguous()
        magnitude = layers[name].magnitude
        if magnitude is not None:
            tensors[f"base_model.model.{name}.{MAGNITUDE}"] = magnitude.detach().cpu().contiguous()
    ranks = {name: len(A) for name, (A, _) in factors.items()}
    alphas = {name: plain_alpha(r=r, scale=layers[name].scale, rslora=rslora) for name, r in ranks.items()}
    # The largest, because loaders reserve memory by it; layers of another rank are named.
    largest = max(ranks, key=lambda name: ranks[name])
    config = LoraConfig(
        r=ranks[largest],
        lora_alpha=alphas[largest],  # type: ignore[arg-type]
        rank_pattern={name: r for name, r in ranks.items() if r != ranks[largest]},
        alpha_pattern={name: alpha for name, alpha in alphas.items() if alpha != alphas[largest]},
        use_rslora=rslora,
        use_dora=any(layer.magnitude is not None for layer in layers.values()),
        target_modules=_target_names(model, set(layers)),
        fan_in_fan_out=was_conv1d(layers[largest].base),
        base_model_name_or_path=root,
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).to_dict()
    config["target_modules"] = sorted(config["target_modules"])  # PEFT keeps a set: no order of its own
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(sorted(tensors.items())), folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", config)
    return ranks[largest]


def _target_names(model: nn.Module, names: set[str]) -> list[str]:
    """Suffixes if they name exactly these layers (what other loaders like best), else full names."""
    suffixes = {name.rpartition(".")[2] for name in names}
    everything = {name.removesuffix(".base") for name in linear_layers(model)}
    matched = {name for name in everything if name.rpartition(".")[2] in suffixes}
    return sorted(suffixes if matched == names else names)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON with a final newline; NaN is an error, not a token."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def model_card(
    folder: Path,
    *,
    root: str,
    method: str,
    paper: str,
    rank: int,
    alpha: float,
    quantization: Quantization | None = None,
    dora: bool = False,
) -> None:
    """A README.md a model hub understands."""
    base, loading = _NF4_CARD if quantization else ("", "")
    kind, serving = "LoRA", f"vLLM needs `--max-lora-rank` of at least {rank}."
    if dora:
        kind, serving = "DoRA", "Where only plain LoRA is served, merge it into the base first."
    source = f"`{method}` ({paper})" if paper else f"`{method}`"
    (folder / "README.md").write_text(
        f"""---
base_model: {root}
library_name: peft
pipeline_tag: text-generation
tags:
- lora
- lorainit
---

# {kind} adapter for {root}

Initialized with {source}; exported as a {"DoRA" if dora else "plain LoRA"} of rank {rank}
(`lora_alpha` {alpha:g}) that loads on the untouched base model{base}:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM{", BitsAndBytesConfig" if quantization else ""}

base = AutoModelForCausalLM.from_pretrained("{root}"{loading})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```

{serving} `manifest.json` says exactly what ran, `init_report.json`
what the initialization did to each layer.
"""
    )


# Which base it was trained on, and how to load that one: the adapter fits the full-precision base too.
_NF4_CARD = (
    " and was trained on that model\nloaded in NF4 (bitsandbytes, blocks of 64, no double quantization)",
    """, quantization_config=BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=False
)""",
)

# --- checking ----------------------------------------------------------------------------------


def prompts(samples: Sequence[Sample]) -> list[Tensor]:
    """The fixed prompts of the check: the beginnings of the first rows of the file."""
    return [s.ids[:PROMPT_TOKENS].long() for s in samples[:MAX_PROMPTS]]


@torch.no_grad()
def record(model: nn.Module, texts: Sequence[Tensor], *, on_event: Callable[[Event], None]) -> list[Tensor]:
    """The model's logits on each prompt, one at a time, on the CPU."""
    device = next(model.parameters()).device
    logits = []
    for done, ids in enumerate(texts, start=1):
        logits.append(model(input_ids=ids[None].to(device)).logits[0].float().cpu())
        on_event(Tick(done=done, total=len(texts)))
    return logits


def check(
    base: nn.Module,
    folder: Path,
    texts: Sequence[Tensor],
    expected: Sequence[Tensor],
    *,
    source_rank: int,
    base_sha256: str,
    dtype: torch.dtype,
    on_event: Callable[[Event], None],
    place: Callable[[nn.Module, list[nn.Parameter]], None] = lambda _model, _adapter: None,
) -> dict[str, Any]:
    """Load the exported adapter with stock PEFT on a fresh base and compare with the trained model.

    Args:
        base: a second copy of the base, which is let go of; the trained model should be gone by now.
        place: moves the model to where it can run, if it does not lie there; also told the adapter's parameters.

    Returns:
        The object shown as `job.export_check`; the caller decides with `require`.
    """
    model = with_stock_peft(base, folder)
    missing = _unread_tensors(model, folder)
    place(model, [p for name, p in model.named_parameters() if ".lora_" in name])
    found = record(model, texts, on_event=on_event)
    difference = max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True))
    largest = max(float(a.abs().max()) for a in expected)
    tolerance = TOLERANCE[dtype] * max(1.0, largest)
    free(model)
    config = json.loads((folder / "adapter_config.json").read_text())
    return {
        "passed": difference <= tolerance and not missing,
        "checked_at": int(time.time()),
        "format": "peft_dora" if config["use_dora"] else "peft",
        "source_rank": source_rank,
        "export_rank": config["r"],
        "recompressed": False,
        "prompts": len(texts),
        "max_abs_logit_difference": difference,
        "tolerance": tolerance,
        "loaders": [{"name": "peft", "version": version("peft"), "loaded": not missing, "message": missing}],
        "base_sha256": base_sha256,
        "adapter_sha256": file_sha256(folder / WEIGHTS),
    }


def with_stock_peft(base: nn.Module, folder: Path) -> nn.Module:
    """The exported adapter on `base` as any user's PEFT would put it there: unmerged, its factors in float32."""
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.23 by an old name, and only warns about what it does not find:
        # `_unread_tensors` looks for itself.
        warnings.simplefilter("ignore")
        model: nn.Module = PeftModel.from_pretrained(base, folder)
    return model.eval()


def _unread_tensors(model: nn.Module, folder: Path) -> str | None:
    """What the loader left unread: an adapter that trained little would pass on logits alone."""
    loaded = {n.replace(".default.", "."): p for n, p in model.named_parameters() if ".lora_" in n}
    loaded = {n.replace(f"{MAGNITUDE}.weight", MAGNITUDE): p for n, p in loaded.items()}
    stored = load_file(folder / WEIGHTS)
    for name in sorted(loaded.keys() | stored.keys()):
        if name not in loaded or name not in stored or not torch.equal(loaded[name].float().cpu(), stored[name]):
            return f"{name} was not read back as written"
    return None


def require(result: dict[str, Any]) -> None:
    """Raise `ExportCheckFailed` unless the check passed."""
    if result["passed"]:
        return
    unread = result["loaders"][0]["message"]
    raise ExportCheckFailed(
        f"The exported adapter on the untouched base is not the trained model: logits differ by"
        f" {result['max_abs_logit_difference']:.3g} (tolerance {result['tolerance']:.3g})"
        + (f"; {unread}." if unread else ".")
    )


def file_sha256(path: Path) -> str:
    """Lower-case hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
