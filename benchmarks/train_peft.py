"""HF Trainer with PEFT as a competitor: for `make bench-train` and `make gpu-day`.

Needs transformers, PEFT and accelerate; knows nothing of Lorainit.
"""

from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments


def lora(*, r: int, alpha: int) -> LoraConfig:
    """A LoRA on all linear layers but the head, without dropout."""
    return LoraConfig(r=r, lora_alpha=alpha, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")


def trainer(model: Any, rows: Any, arguments: dict[str, Any], *, collator: Any, r: int, alpha: int) -> Trainer:
    """`transformers.Trainer` over PEFT's model; `arguments` are TrainingArguments' keywords."""
    return Trainer(
        model=get_peft_model(model, lora(r=r, alpha=alpha)),
        args=TrainingArguments(**arguments),
        train_dataset=rows,
        data_collator=collator,
    )
