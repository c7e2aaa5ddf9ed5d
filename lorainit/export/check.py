"""The export check: stock PEFT loads the written adapter on a fresh base, and its results are compared with ours.

PEFT is used because most people load adapters with it. Each layer is compared by itself, then the model's logits
(docs/decisions/0028).
"""

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lorainit.config.errors import ExportCheckFailed
from lorainit.config.events import OnEvent, Tick
from lorainit.data.dataset import Sample
from lorainit.export.effect import Change, Effect, logits_of, norm_of, observe_peft
from lorainit.export.peft_adapter import MAGNITUDE, WEIGHTS
from lorainit.runtime.machine_errors import is_machine_failure

MAX_PROMPTS, PROMPT_TOKENS = 4, 64
# Tolerances for one layer, computed in float64 from factors in float32: relative to what the adapter adds (LAYER) and
# to the base's output (BASE). ZERO, relative to the base's output, is for a difference form that has learned nothing:
# its two products cancel, and only rounding is left.
LAYER, BASE, ZERO = 1e-5, 1e-6, 1e-12
# Tolerances for logits: relative to the adapter's effect on a token's logits, plus relative to the largest logit. The
# latter is above float64's own rounding because many architectures compute norms and rotations in float32 anyway.
EFFECT, ROUNDING = 1e-3, {torch.float64: 1e-6, torch.float32: 3e-5}
# The same for a sharded base, whose logits can be computed in the run's own format only.
OWN = 1e-4
# The share of tokens that may differ by more: if two experts have nearly equal scores, rounding decides between them.
APART = 0.05
_NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}
# The classes of errors that loaders and models raise about a model that they cannot handle. Our own errors are not
# among them.
FAULTS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)


def make_prompts(samples: Sequence[Sample], *, rows: int = MAX_PROMPTS, tokens: int = PROMPT_TOKENS) -> list[Tensor]:
    """The fixed prompts of the check: the beginnings of the first rows of the file."""
    return [s.ids[:tokens].long() for s in samples[:rows]]


# --- loading -------------------------------------------------------------------------------------


def load_with_stock_peft(base: nn.Module, folder: Path) -> Any:
    """The exported adapter on `base`, loaded as a user of PEFT would: unmerged, with factors in float32."""
    from peft import PeftModel

    with warnings.catch_warnings():
        # PEFT 0.21 uses an outdated name of transformers 5.23, which gives a warning here. About tensors that are
        # missing it only warns too, so `_unread_tensors` checks them.
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base, folder).eval()


def _unread_tensors(model: nn.Module, folder: Path) -> str | None:
    """The first tensor that was not loaded as written, as a sentence; None if all were.

    Compared exactly, because an adapter that was trained little changes the logits so little that a missing tensor
    would not show there.
    """
    loaded = {n.replace(".default.", "."): p for n, p in model.named_parameters() if ".lora_" in n}
    loaded = {n.replace(f"{MAGNITUDE}.weight", MAGNITUDE): p for n, p in loaded.items()}
    stored = load_file(folder / WEIGHTS)
    for name in sorted(loaded.keys() | stored.keys()):
        if name not in loaded or name not in stored or not torch.equal(loaded[name].float().cpu(), stored[name]):
            return f"{name} was not read back as written"
    return None


# --- comparing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """The result of a comparison; `message`: what is wrong, None = nothing."""

    message: str | None = None
    layer: float = 0.0
    logit: float = 0.0
    tolerance: float = 0.0
    distance: float | None = None
    apart: int = 0


def check(
    base: nn.Module,
    folder: Path,
    effect: Effect,
    *,
    source_rank: int,
    base_sha256: str,
    on_event: OnEvent,
    layers_only: bool = False,
    shard_copy: Callable[[nn.Module, list[nn.Parameter]], None] = lambda _model, _adapter: None,
) -> tuple[dict[str, Any], Any]:
    """Load the exported adapter with stock PEFT on a fresh base and compare what it does.

    Args:
        base: a second copy of the base.
        effect: what the adapter does on the base that it was trained on.
        layers_only: do not compare logits, because this copy is not distributed over devices as that base is.
        shard_copy: divides the model between devices if the base is sharded; gets the adapter's parameters too.

    Returns:
        The object shown as `job.export_check`, to be passed to `require`, and the base with the adapter on it (None if
        PEFT could not load it).
    """
    started, model, unread = time.monotonic(), None, None
    # Read before the passes: processes that share a base make these together, and rank 0 moves the files after them.
    config, digest = json.loads((folder / "adapter_config.json").read_text()), file_sha256(folder / WEIGHTS)
    try:
        model = load_with_stock_peft(base, folder)
        unread = _unread_tensors(model, folder)
        shard_copy(model, [p for name, p in model.named_parameters() if ".lora_" in name])
        found = _compare(model, effect, layers_only=layers_only, on_event=on_event)
    except FAULTS as error:
        if is_machine_failure(error):  # not the adapter's fault, so it is no result of the check
            raise
        found = _Found(
            f"{'loading it' if model is None else 'running it'} failed: {summarize_error(error)}", distance=None
        )
        unread = unread or (found.message if model is None else None)
    message = unread or found.message
    return {
        "passed": message is None,
        "checked_at": int(time.time()),
        "format": "peft_dora" if config["use_dora"] else "peft",
        "source_rank": source_rank,
        "export_rank": config["r"],
        "recompressed": False,
        "prompts": len(effect.texts),
        "max_abs_logit_difference": found.logit,
        "tolerance": found.tolerance,
        "loaders": [{"name": "peft", "version": version("peft"), "loaded": unread is None, "message": unread}],
        "base_sha256": base_sha256,
        "adapter_sha256": digest,
        "message": message,
        "arithmetic": _NAMES[effect.dtype],
        "modules": len(effect.changes),
        "max_module_difference": found.layer,
        "max_abs_logit_effect": max(float(moved.max()) for moved in effect.moved),
        "relative_logit_difference": found.distance,
        "without_effect": effect.absent,
        "tokens": sum(len(moved) for moved in effect.moved),
        "tokens_apart": found.apart,
        "precision_noise": effect.noise,
        "seconds": round(time.monotonic() - started, 2),
    }, model


def summarize_error(error: Exception) -> str:
    """An error's class and text on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _compare(model: Any, effect: Effect, *, layers_only: bool, on_event: OnEvent) -> _Found:
    worst, message = _compare_layers(model, effect, on_event=on_event)
    if layers_only:
        return _Found(message, layer=worst)
    reloaded = logits_of(
        model.get_base_model(), effect.texts, dtype=effect.dtype if effect.widened else None, on_event=on_event
    )
    rounding = ROUNDING[effect.dtype] if effect.widened else OWN
    off = [(a - b).abs().amax(1) for a, b in zip(reloaded, effect.logits, strict=True)]
    sizes = [logits.abs().amax(1) for logits in effect.logits]
    allowed = [EFFECT * moved + rounding * size for moved, size in zip(effect.moved, sizes, strict=True)]
    apart = sum(int((~(o <= a)).sum()) for o, a in zip(off, allowed, strict=True))
    largest, tokens = max(float(o.max()) for o in off), sum(len(o) for o in off)
    # In bf16 only the layers decide, because rounding makes a mixture choose other experts for some tokens.
    decides = effect.dtype != torch.bfloat16
    if message is None and decides and apart > APART * tokens:
        moved = max(float(m.max()) for m in effect.moved)
        message = (
            f"the logits of {apart} of {tokens} tokens differ, by {largest:.3g} at most, where the adapter changes"
            f" them by up to {moved:.3g}"
        )
    size = norm_of(effect.moved)
    return _Found(
        message=message,
        layer=worst,
        logit=largest,
        tolerance=max(float(a.max()) for a in allowed),
        distance=norm_of(off) / size if size else None,
        apart=apart,
    )


def _compare_layers(model: Any, effect: Effect, *, on_event: OnEvent) -> tuple[float, str | None]:
    """The largest relative difference of what adapters add, and what is wrong with the first wrong layer."""
    worst, message, missing = 0.0, None, dict.fromkeys(effect.changes)
    for done, (name, reloaded) in enumerate(observe_peft(model.get_base_model(), effect.changes), start=1):
        if name in missing:
            del missing[name]
            difference, wrong = _differ(effect.changes[name], reloaded)
            worst, message = max(worst, difference), message or (wrong and f"{name}: {wrong}")
        else:
            message = message or f"{name} is adapted where it is read, and was not trained"
        on_event(Tick(done=min(done, len(effect.changes)), total=len(effect.changes)))
    return worst, next((f"{name} was trained, and is not adapted where it is read" for name in missing), message)


def _differ(trained: Change, reloaded: Change) -> tuple[float, str | None]:
    """The relative difference of what the adapter adds in one layer, and what is wrong, if anything."""
    if trained.added.shape != reloaded.added.shape:
        return float("inf"), "the layer has another width"
    base, added = float(trained.base.norm()), float(trained.added.norm())
    off, moved = float((reloaded.added - trained.added).norm()), float((reloaded.base - trained.base).norm())
    difference = off / added if added else float(off > ZERO * base)
    if not moved <= BASE * base:
        return difference, f"the base model's own layer differs by {moved / base if base else moved:.3g} of its output"
    if not off <= LAYER * added + ZERO * base:
        return difference, f"what it adds differs by {difference:.3g} of its size from what was trained"
    return (difference if added > ZERO * base else 0.0), None


def require(result: dict[str, Any]) -> None:
    """Raise `ExportCheckFailed` unless the check passed."""
    if not result["passed"]:
        peft = result["loaders"][0]["version"]
        raise ExportCheckFailed(
            f"With stock PEFT {peft} the exported adapter does not compute what was trained, on the untouched base:"
            f" {result['message']}."
        )


def file_sha256(path: Path) -> str:
    """The file's SHA-256 in lower-case hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
