"""What a run came to, judged by its own log: an adapter that is worse than its start is a success only in form."""

import json
from pathlib import Path
from typing import Any

from lorainit.events import Warned

# What PiSSA and LoRAM needed where the base rate of 1e-3 made a model worse (docs/log.md).
LOWER = 5


def judge(log: Path, *, rate: float) -> list[Warned]:
    """The warnings of a run, from the validation losses of its `metrics.jsonl`; none without a validation file.

    Args:
        rate: the run's peak learning rate.
    """
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    losses = {row["step"]: row["full_valid_loss"] for row in rows if row["full_valid_loss"] is not None}
    if len(losses) < 2 or 0 not in losses:
        return []
    start, end = losses[0], losses[max(losses)]
    if end <= start:
        return []
    lower = float(f"{rate / LOWER:.1e}")
    text = (
        f"The validation loss ended at {end:.4f}, above the {start:.4f} that it started from: this adapter makes the"
        f" model worse. Try learning_rate {lower:g}, a fifth of this run's {rate:g}"
    )
    best = min(losses, key=lambda step: losses[step])
    text += f", or {best} steps, where the loss was {losses[best]:.4f}." if best else "."
    return [Warned(code="worse_than_base", message=text, data={"start": start, "end": end, "learning_rate": lower})]


def judge_effect(export_check: dict[str, Any]) -> list[Warned]:
    """A warning where the check found that the adapter changes nothing: then it has shown little, and is of no use."""
    if not export_check["without_effect"]:
        return []
    text = (
        "The adapter does nothing: on the first training rows the model says the same with it as without it. A run of"
        " very few steps at a rate that was still warming up from zero is the usual cause."
    )
    return [Warned(code="no_effect", message=text, data={"effect": export_check["max_abs_logit_effect"]})]
