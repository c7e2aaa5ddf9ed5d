"""What one training step asks of the pretended GPU, and of it each decoder layer: launches, waits, bytes that cross.

`python -m tests.pretended.budgets [CASE ...]` counts and prints; `python -m tests.pretended.budgets --accept` writes
what is lower than before into budgets.json. What is higher it never writes: whoever has a reason for that writes it by
hand, and the reason into the commit.
"""

import json
import sys
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

from tests.pretended import device, engine

BUDGETS = Path(__file__).with_name("budgets.json")
Budget = dict[str, int]
CASES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp32": {"precision": "fp32"},
    "LoRA+": {"optimizer": {"name": "adamw_lora_plus", "ratio": 16}},
    "DoRA": {"lora": {"use_dora": True}},
    "dropout": {"lora": {"dropout": 0.1}},
    "a start that is subtracted": {"lora": {"init": "pissa"}},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "two micro-batches": {"micro_batch_size": 2},
    "three adapters": {"members": 3},
}
FEW, MORE = 2, 3  # layers


def count(case: str, folder: Path) -> Budget:
    """Of a step of two layers with seven adapted matrices each; `... a layer` is what a third one adds."""
    few, more = (_step(folder / f"{layers}", layers=layers, **CASES[case]) for layers in (FEW, MORE))
    each = {f"{what} a layer": (more[what] - few[what]) // (MORE - FEW) for what in few}
    return {**few, **each}


def _step(folder: Path, *, layers: int, **asked: Any) -> Budget:
    """From the metrics of the second step to those of the third; nothing before and after them is counted."""
    from benchmarks.gpu import jobs
    from benchmarks.gpu.day import Day
    from lorainit.errors import Stopped
    from lorainit.events import Event, Metrics, Tick
    from lorainit.run import Request, run_together
    from tests.lorainit.conftest import tiny_llama

    jobs.MAKERS["counted"] = lambda: tiny_llama(64, 128, num_hidden_layers=layers)
    folder.mkdir(parents=True)
    their, seen = jobs.Jobs(Day.begun("cpu", folder=folder, tiny=True, seconds=1e6)), list[tuple[int, int, int]]()

    def note(event: Event) -> None:
        tally = device.tally()
        if isinstance(event, Metrics):
            seen.append((tally.launches, tally.waits, tally.crossed))
        elif isinstance(event, Tick) and len(seen) == 3:
            raise Stopped("All is counted.")

    members = asked.pop("members", 1)
    lora = {"init": "kaiming", "r": 4, **asked.pop("lora", {})}
    more = {key: asked.pop(key) for key in ("micro_batch_size", "precision") if key in asked}
    training = {"batch_size": 4, "max_steps": 4, "checkpoint_interval": 100, **asked}
    specs = [their.spec("counted", lora=lora, training=training, seed=n, **more) for n in range(members)]
    listeners = [note, *[lambda _: None] * (members - 1)]
    requests = [Request(spec, folder / f"out-{n}", listeners[n]) for n, spec in enumerate(specs)]
    with suppress(Stopped), mock.patch("lorainit.proof.prove", return_value=None):
        list(run_together(requests))
    (launches, waits, crossed), (more_launches, more_waits, more_crossed) = seen[1:3]
    return {
        "launches": more_launches - launches,
        "waits": more_waits - waits,
        "bytes across": more_crossed - crossed,
    }


def counted(cases: Sequence[str]) -> dict[str, Budget]:
    """In a process whose `lorainit` takes the pretended device for CUDA."""
    warnings.simplefilter("ignore")
    device.install()
    engine.install()
    with tempfile.TemporaryDirectory() as folder, device.switched_on():
        return {case: count(case, Path(folder) / f"{n}") for n, case in enumerate(cases)}


def accept(found: dict[str, Budget], known: dict[str, Budget]) -> dict[str, Budget]:
    """The budgets, with what has become less and cases that are new."""
    return {
        case: {what: min(value, known.get(case, {}).get(what, value)) for what, value in budget.items()}
        for case, budget in found.items()
    }


def known() -> dict[str, Budget]:
    """The budgets that are kept."""
    budgets: dict[str, Budget] = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    return budgets


if __name__ == "__main__":
    arguments = sys.argv[1:]
    now = counted(list(CASES) if arguments in ([], ["--accept"]) else arguments)
    if arguments == ["--accept"]:
        BUDGETS.write_text(json.dumps(accept(now, known()), indent=2) + "\n")
    print(json.dumps(now))
