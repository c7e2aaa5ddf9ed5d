"""One run of a competitor, in the competitors' environment: TRL's SFTTrainer, or HF Trainer with PEFT.

    .venvs/competitors/bin/python benchmarks/train_rivals.py ORDER.json RESULT.json

ORDER.json says what to do (`train_plan.Rival` and the rows' file). Both trainers get token ids and labels: TRL leaves
a data set alone that has them already, but for packing. Nothing of Lorainit's engine is imported here.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.train_peft import lora, trainer

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "trl")


class Clock(TrainerCallback):
    """Seconds of every optimizer step, and when the first one was done (CLOCK_MONOTONIC: the same in all processes)."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.first = self.before = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.before = time.monotonic()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """From one step's end to the next: fetching and padding the rows are part of a step."""
        now = time.monotonic()
        self.first = self.first or now
        self.seconds.append(now - self.before)
        self.before = now


class Counting:
    """A collator that remembers how many tokens each batch trains and how many are no padding."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.trained: list[int] = []
        self.tokens: list[int] = []

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        # A position is trained by predicting it, so a row's first label never counts, packed or not.
        self.trained.append(sum(label != -100 for row in rows for label in list(row["labels"])[1:]))
        self.tokens.append(sum(len(row["input_ids"]) for row in rows))
        return self.inner(rows)


def main(order_file: str, result_file: str) -> None:
    order = json.loads(Path(order_file).read_text())
    exact = order["machine"] and route_float32_to_onednn()
    rows = Dataset.from_list(json.loads(Path(order["rows"]).read_text()))
    one = {"trl": trl_trainer, "hf": hf_trainer}[order["trainer"]](order, rows)
    clock = Clock()
    one.add_callback(clock)
    counting = one.data_collator = Counting(one.data_collator)
    one.train()
    at_end = peak()
    one.save_model(order["adapter"])
    steps = len(clock.seconds)
    result = {
        "seconds": clock.seconds, "trained": counting.trained[:steps], "tokens": counting.tokens[:steps],
        "first_step": clock.first, "peak_training": at_end, "peak": peak(), "onednn": exact,
        "versions": {name: version(name) for name in PACKAGES},
    }  # fmt: skip
    Path(result_file).write_text(json.dumps(result))


def trl_trainer(order: dict[str, Any], rows: Dataset) -> Trainer:
    options = {"dtype": order["dtype"], "attn_implementation": order["attention"]}
    chosen = {name: value for name, value in options.items() if value is not None}
    made: Trainer = SFTTrainer(
        model=order["base"],
        args=SFTConfig(**order["arguments"], model_init_kwargs=chosen or None),
        train_dataset=rows,
        peft_config=lora(r=order["r"], alpha=order["alpha"]),
    )
    return made


def hf_trainer(order: dict[str, Any], rows: Dataset) -> Trainer:
    model = AutoModelForCausalLM.from_pretrained(
        order["base"], dtype=order["dtype"], attn_implementation=order["attention"]
    )
    collator = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(order["base"]))
    return trainer(model, rows, order["arguments"], collator=collator, r=order["r"], alpha=order["alpha"])


def route_float32_to_onednn() -> bool:
    """Multiply float32 matrices by oneDNN, which is faster than MKL on some processors, if the result is float32's.

    Where the processor has matrix units for bf16 the same switch rounds the operands: then it is put back.
    """
    X = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    true = X.double() @ X.double()
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    exact = float((X @ X - true).norm() / true.norm()) < 1e-5
    if not exact:
        matmul.fp32_precision = before
    return exact


def peak() -> int:
    """The most memory that this process has held, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
