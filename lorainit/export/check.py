"""The proof of a download: stock PEFT reads the written adapter on a fresh base as it was trained."""

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from lorainit.data import Sample
from lorainit.errors import ExportCheckFailed
from lorainit.events import Event, Tick
from lorainit.export.peft_adapter import MAGNITUDE, WEIGHTS
from lorainit.model.load import free

MAX_PROMPTS, PROMPT_TOKENS = 16, 64
# Largest logit difference that is rounding, relative to the largest logit (at least 1). In bf16 PEFT rounds
# both branches before it adds them, which we do not.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


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
