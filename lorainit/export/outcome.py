"""Warnings about the result of a run that succeeded: the adapter is worse than its base, or changes nothing."""

import json
from pathlib import Path
from typing import Any

from lorainit.config.events import Warned

# PiSSA and LoRAM needed a fifth of the rate of 1e-3 that had made a model worse (docs/log.md).
RATE_DIVISOR = 5


def find_warnings(log: Path, *, rate: float, usual: float, base: float | None = None) -> list[Warned]:
    """The warnings of a run, from the validation losses of its `metrics.jsonl`; none without a validation file.

    Args:
        rate: the run's peak learning rate.
        usual: the default rate of this base and method.
        base: the untouched base's loss on the same rows; None if the run started from the base itself.
    """
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    losses = {row["step"]: row["full_valid_loss"] for row in rows if row["full_valid_loss"] is not None}
    if len(losses) < 2 or 0 not in losses:
        return []
    start, end = losses[0], losses[max(losses)]
    base = start if base is None else base
    if end <= min(base, start):
        return []
    fifth = rate / RATE_DIVISOR
    lower = float(f"{min(fifth, usual):.1e}")
    which = "a fifth" if fifth <= usual else "the default of this base and initialization, instead"
    text = f"The validation loss ended at {end:.4f}, {_above(base, start, end)}"
    text += f" Try learning_rate {lower:g}, {which} of this run's {rate:g}"
    best = min(losses, key=lambda step: losses[step])
    text += f", or {best} steps, where the loss was {losses[best]:.4f}." if best else "."
    data = {"base": base, "start": start, "end": end, "learning_rate": lower}
    return [Warned(code="worse_than_base" if end > base else "worse_than_start", message=text, data=data)]


def _above(base: float, start: float, end: float) -> str:
    if end > base:
        own = f" (this run started from {start:.4f})" if start != base else ""
        return f"above the untouched base's {base:.4f}{own}: this adapter makes the model worse."
    gained = f"though below the untouched base's {base:.4f}"
    return f"above the {start:.4f} that this run started from, {gained}: training undid what the initialization gained."


def find_effect_warnings(export_check: dict[str, Any]) -> list[Warned]:
    """A warning if the export check found that the adapter changes nothing, because then it is of no use."""
    if not export_check["without_effect"]:
        return []
    text = (
        "The adapter does nothing: on the first training rows the model's logits are the same with and without it. The"
        " usual cause is a run of very few steps, whose learning rate was still warming up from zero."
    )
    return [Warned(code="no_effect", message=text, data={"effect": export_check["max_abs_logit_effect"]})]
