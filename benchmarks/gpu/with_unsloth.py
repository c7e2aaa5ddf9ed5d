"""Steps by Unsloth, in the process that loads it: `python -m benchmarks.gpu.with_unsloth FOLDER DEVICE [tiny]`.

Prints rows of the table of steps. Unsloth is given a base on disk, as its users have one, so the largest is left out.
"""

import sys
from pathlib import Path
from typing import Any

from unsloth import FastLanguageModel  # before transformers, which it changes

import torch  # isort: skip

from benchmarks.gpu.day import Day, llama  # isort: skip
from benchmarks.gpu.meter import Meter
from benchmarks.gpu.rivals import Metered, arguments_of, samples
from benchmarks.gpu.steps import HEAD, RANK, RULE, STEPS, Case, measured
from tests.lorainit.conftest import make_tokenizer

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main(folder: str, device: str, *tiny: str) -> None:
    day = Day.begun(device, folder=Path(folder), tiny=bool(tiny), seconds=1e6)
    print(f"{HEAD}\n{RULE}", flush=True)
    for case in [Case("tiny", 4, 64)] if tiny else [case for case in STEPS if case.shape != "8B"]:
        found = measured(day, case, _adapted(day, case), _drive)
        print(f"| {case.shape} | {case.rows} | Unsloth | {found}", flush=True)


def _adapted(day: Day, case: Case) -> Any:
    base = day.folder / f"base-{case.shape}"
    if not base.exists():
        llama(case.shape, day.device, torch.bfloat16).save_pretrained(base)
        make_tokenizer().save_pretrained(base)
    model, _ = FastLanguageModel.from_pretrained(
        str(base), max_seq_length=case.length, dtype=torch.bfloat16, load_in_4bit=False
    )
    return FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=2 * RANK, lora_dropout=0, bias="none", target_modules=LAYERS,
        use_gradient_checkpointing=case.again,
    )  # fmt: skip


def _drive(day: Day, case: Case, model: Any, meter: Meter) -> None:
    from transformers import Trainer, TrainingArguments, default_data_collator

    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments_of(day, case, meter)),
        train_dataset=samples(case, meter),
        data_collator=default_data_collator,
    )
    trainer.add_callback(Metered(meter))
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
