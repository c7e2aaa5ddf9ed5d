"""The rows of all experiments: short problems of GSM8K, so that a run takes about a minute on two cores."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.rates_rows import read_maths

TRAINING_ROWS, HELD_OUT_ROWS = 320, 32


def write_rows(gsm8k: Path, folder: Path) -> tuple[Path, Path]:
    """The training and the validation file, written to `folder`.

    Raises:
        ValueError: the data set has too few short rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = (("train", TRAINING_ROWS), ("test", HELD_OUT_ROWS))
    first, second = (
        _write(read_maths(gsm8k / f"{part}.jsonl"), count, folder / f"{part}.jsonl") for part, count in wanted
    )
    return first, second


def _write(rows: Sequence[dict[str, Any]], count: int, path: Path) -> Path:
    if len(rows) < count:
        raise ValueError(f"{path.name} of this data set has {len(rows)} short rows, and {count} are needed.")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
    return path


def compute_sha256(path: Path) -> str:
    """The digest by which a service knows a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
