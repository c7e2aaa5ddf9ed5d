"""Held-out loss of an adapter, whoever trained it: stock PEFT on a float32 base, our `sum_losses`.

    python benchmarks/train_judge.py BASE HELD.json ADAPTER

Prints nats per token.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from peft import PeftModel  # noqa: E402

from lorainit.data.batches import Budget, collate, split_into_batches  # noqa: E402
from lorainit.data.dataset import Sample  # noqa: E402
from lorainit.model.forward.loss import sum_losses  # noqa: E402
from lorainit.model.load import load_model  # noqa: E402

ROWS_PER_PASS = 8


def main(base: str, held: str, adapter: str) -> None:
    rows = json.loads(Path(held).read_text())
    samples = [
        Sample(number, torch.tensor(row["input_ids"]), torch.tensor(row["labels"]) >= 0)
        for number, row in enumerate(rows, start=1)
    ]
    model = load_model(Path(base), dtype=torch.float32, device=torch.device("cpu"))
    print(loss(PeftModel.from_pretrained(model, adapter), samples))


@torch.no_grad()
def loss(model: Any, samples: list[Sample]) -> float:
    """Nats per trained token."""
    model.eval()
    parts = [sum_losses(model, collate(piece, pad=0)) for piece in split_into_batches(samples, Budget(ROWS_PER_PASS))]
    return sum(float(part.loss) for part in parts) / sum(part.tokens for part in parts)


if __name__ == "__main__":
    main(*sys.argv[1:])
