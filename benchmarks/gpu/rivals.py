"""Who our steps are measured beside: `transformers.Trainer` with PEFT, and Unsloth, if they are installed."""

import subprocess
import sys
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, default_data_collator

from benchmarks.gpu.day import SHAPES, Day, rows
from benchmarks.gpu.meter import Meter
from benchmarks.gpu.steps import RANK, Case
from benchmarks.train_peft import trainer
from benchmarks.train_plan import Rival, Work, rival_arguments

ROOT = Path(__file__).parents[2]


class Metered(TrainerCallback):
    """From one step's end to the next: fetching the rows and bringing them to the device are part of a step."""

    def __init__(self, meter: Meter) -> None:
        self.meter, self.step = meter, ExitStack()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.step.enter_context(self.meter.step())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.step.close()
        if self.meter.done < self.meter.steps:
            self.step.enter_context(self.meter.step())


def hf_trainer(day: Day, case: Case, model: Any, meter: Meter) -> None:
    """`transformers.Trainer` with PEFT; on a GPU with `bf16`, which is autocast, as its users set it."""
    model.set_attn_implementation("sdpa")
    arguments = arguments_of(day, case, meter)
    one = trainer(model, samples(case, meter), arguments, collator=default_data_collator, r=RANK, alpha=2 * RANK)
    one.add_callback(Metered(meter))
    one.train()


def arguments_of(day: Day, case: Case, meter: Meter) -> dict[str, Any]:
    """TrainingArguments' keywords for so many steps as the meter wants."""
    work = Work(steps=meter.steps, batch=case.count, r=RANK, alpha=2 * RANK, learning_rate=1e-4)
    own: dict[str, Any] = {"use_cpu": not day.has_gpu, "bf16": day.has_gpu, "dataloader_pin_memory": day.has_gpu}
    own["logging_strategy"] = "no"
    if case.again:
        own |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return rival_arguments(work, Rival("hf", arguments=own), out=day.folder / "trainer")


def samples(case: Case, meter: Meter) -> list[dict[str, list[int]]]:
    """Token ids and labels for every step; rows are of one length, so there is nothing to pad."""
    made = rows(case.count, case.length, SHAPES[case.shape]["vocab_size"])
    one = [{"input_ids": s.ids.tolist(), "labels": s.ids.long().masked_fill(~s.trained, -100).tolist()} for s in made]
    return one * meter.steps


# --- Unsloth ---------------------------------------------------------------------------------------


def unsloth(day: Day) -> None:
    """Unsloth in a process of its own, since it changes transformers when it is loaded; its rows as they come.

    What goes wrong with it is told, and is no fault of ours.
    """
    if find_spec("unsloth") is None:
        day.say("Unsloth is not installed: its steps were not measured.")
        return
    asked = [day.folder, day.device.type, *["tiny"] * day.tiny]
    command = [sys.executable, "-m", "benchmarks.gpu.with_unsloth", *asked]
    log = day.folder / "unsloth.log"
    with log.open("w") as err, subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=err) as child:
        for line in child.stdout or ():
            if line.startswith(b"|"):  # it prints words of its own
                day.say(line.decode().rstrip("\n"))
    if child.returncode:
        last = (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        day.say(f"\nUnsloth failed with exit code {child.returncode}: {last[:300]}")
