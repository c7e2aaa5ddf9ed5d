"""The result file: one CSV row per logged step, with the columns of OpenAI's service. Loads no torch."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

# Public samples of such files have two names for the training accuracy. It is written under both, so that scripts made
# for either of them work.
COLUMNS = {
    "step": "step",
    "train_loss": "train_loss",
    "train_accuracy": "train_mean_token_accuracy",
    "valid_loss": "valid_loss",
    "valid_mean_token_accuracy": "valid_mean_token_accuracy",
    "train_mean_token_accuracy": "train_mean_token_accuracy",
    "full_valid_loss": "full_valid_loss",
    "full_valid_mean_token_accuracy": "full_valid_mean_token_accuracy",
    "learning_rate": "learning_rate",
    "epoch": "epoch",
    "tokens": "tokens",
}


def write_csv(rows: Iterable[Mapping[str, Any]], stream: TextIO) -> None:
    """Write `step_metrics.csv` from metric mappings (`Metrics.model_dump()`), one per step.

    Args:
        stream: opened with `newline=""`; lines end in LF. Missing and non-finite values are empty.
    """
    stream.write(",".join(COLUMNS) + "\n")
    for row in rows:
        stream.write(",".join(_cell(row.get(name)) for name in COLUMNS.values()) + "\n")


def _cell(value: Any) -> str:
    if value is None or not math.isfinite(value):
        return ""
    return str(value)
