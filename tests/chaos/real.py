"""Jobs on a real base, a two-layer Llama: trained under attack, they must be what is trained in peace, bit for bit.

`python -m tests.chaos.real FOLDER` makes the base, in a process of its own, so that the one that starts
everything never loads torch.
"""

import io
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODEL = "tiny"
# What a clock says; everything else of a step's numbers must be equal.
CLOCKS = ("seconds", "tokens_per_second")


def catalogue(folder: Path) -> str:
    """A base in `folder`, and its entry."""
    subprocess.run([sys.executable, "-m", "tests.chaos.real", str(folder)], check=True, capture_output=True)
    inspect = [sys.executable, "-m", "api.cli", "models", "inspect", str(folder), "--id", MODEL]
    return subprocess.run(inspect, check=True, capture_output=True, text=True).stdout


def orders(count: int, *, steps: int) -> Iterator[dict[str, Any]]:
    """The same order, `count` times, by turns for one process and for two."""
    # Sixteen rows are two micro-batches on a CPU: one for each of two processes.
    numbers = {"n_epochs": 1, "batch_size": 16, "learning_rate": 1e-3, "max_steps": steps, "checkpoint_interval": 20}
    for number in range(count):
        yield {
            "resources": {"devices": 1 + number % 2},
            "model": MODEL,
            "seed": 3,
            "method": {"type": "supervised", "supervised": {"hyperparameters": {**numbers, "precision": "fp32"}}},
            "lora": {"init": "loram", "r": 4},
        }


def weights(content: bytes) -> bytes:
    """The bytes of an adapter's weights."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        file = tar.extractfile("adapter_model.safetensors")
        assert file is not None
        return file.read()


def numbers(rows: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """A job's metrics without what a clock says."""
    return [(row["step"], {k: v for k, v in row["values"].items() if k not in CLOCKS}) for row in rows]


def _make(folder: Path) -> None:
    from tests.lorainit.conftest import make_tokenizer, tiny_llama

    tiny_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


if __name__ == "__main__":
    _make(Path(sys.argv[1]))
