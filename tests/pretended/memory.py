"""`python -m tests.pretended.memory FOLDER CASE ...`: bytes that runs take on the pretended GPU, and what was expected.

A line of JSON for each case. All is counted and nothing sampled: the same bytes every time, whatever else the machine
does. Kernels' own workspaces are not in it, nor what an allocator rounds up.
"""

import gc
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.pretended import device, engine

CASES: dict[str, dict[str, Any]] = {
    "gradients": {"lora": {"init": "lora_ga", "r": 8}, "validation": True},
    "many micro-batches": {"lora": {"r": 64}, "micro_batch_size": 1, "gradient_checkpointing": True},
    "singular vectors": {"lora": {"init": "pissa", "r": 8}},
    "activations": {"lora": {"init": "eva", "r": 8}},
    "moments of inputs": {"lora": {"init": "corda", "r": 8}},
    "LoRA+": {"lora": {"r": 32}, "optimizer": {"name": "adamw_lora_plus", "ratio": 16}, "micro_batch_size": 2},
    "preconditioned": {"lora": {"r": 64}, "optimizer": {"name": "adamw_preconditioned"}},
    "tiny passes": {
        "lora": {"r": 64}, "optimizer": {"name": "adamw_preconditioned"}, "batch_size": 1,
        "gradient_checkpointing": True, "max_length": 20,
    },
    "tiny passes, simultaneous": {
        "lora": {"r": 64}, "optimizer": {"name": "adamw_preconditioned", "update": "simultaneous"}, "batch_size": 1,
        "gradient_checkpointing": True, "max_length": 20,
    },
    "float32": {"lora": {"r": 16}, "precision": "fp32", "validation": True},
    "three together": {"lora": {"r": 32}, "members": 3, "validation": True},
}  # fmt: skip


@dataclass
class Measured:
    """Bytes. `trial`, `steps`: the most that lay there in the try before the first step, and from then to the last.

    `passes`: what the try took beside what lay there. `evidence`: what the initialization took beside that, and
    `kept`: how much of it was asked for. `copy`: what the check took on a device that was empty, and `expected`.
    """

    trial: int = 0
    steps: int = 0
    passes: int = 0
    evidence: int = 0
    kept: int = 0
    copy: int = 0
    expected: list[float] = field(default_factory=list)


class Stopwatch:
    """Peaks between events."""

    def __init__(self) -> None:
        self.found, self._at, self._held = Measured(), "loading", 0

    def hear(self, event: Any) -> None:
        """A listener of all runs of a process."""
        kind = event.kind
        if kind == "message" and "proof" in event.data:
            self._turn("evidence")
        elif kind == "init_report":
            self._turn("trial")
        elif kind == "stage" and event.stage in ("training", "evaluating"):
            self._turn("steps")
        elif kind == "stage" and event.stage in ("exporting", "initializing"):
            self._turn("other")
        elif kind == "stage" and event.stage == "verifying":
            self._turn("copy")

    def _turn(self, to: str) -> None:
        memory, found = device.memory, self.found
        grown = memory.peak - self._held
        if self._at == "evidence":
            found.evidence = max(found.evidence, grown)
        elif self._at == "trial":
            found.trial, found.passes = max(found.trial, memory.peak), max(found.passes, grown)
        elif self._at == "steps":
            found.steps = max(found.steps, memory.peak)
        elif self._at == "copy":
            found.copy = max(found.copy, memory.peak)
        gc.collect()
        self._at, self._held, memory.peak = to, memory.held, memory.held

    def done(self) -> Measured:
        self._turn("over")
        return self.found


def main(folder: Path, names: list[str]) -> None:
    warnings.simplefilter("ignore")
    device.install()
    engine.install()
    from benchmarks.gpu import jobs
    from benchmarks.gpu.day import Day
    from lorainit.context import RunRequest
    from lorainit.init.collectors import memory as evidence
    from lorainit.model import memory
    from lorainit.run import run_together
    from lorainit.train import memory as training
    from tests.lorainit.conftest import tiny_llama

    training.PROBED = 64  # measured passes have to be smaller than a step of these few short rows
    jobs.MAKERS["broad"] = lambda: tiny_llama(256, 512)
    for name in names:
        watch, asked = Stopwatch(), dict(CASES[name])
        lora, members = {"init": "kaiming", **asked.pop("lora")}, asked.pop("members", 1)
        more = {key: asked.pop(key) for key in ("micro_batch_size", "precision") if key in asked}
        day = Day.begun("cpu", folder=folder / name.replace(" ", "-"), tiny=True, seconds=1e6)
        day.folder.mkdir(parents=True)
        their = jobs.Jobs(day)
        data = {"validation": str(their.rows)} if asked.pop("validation", False) else {}
        specs = [their.spec("broad", lora=lora, data=data, training=asked, seed=n, **more) for n in range(members)]
        _note(memory, "copy_bytes", watch.found.expected.append)
        _note_kept(evidence, watch.found)
        with device.switched_on():
            ends = list(run_together([RunRequest(s, day.folder / f"{n}", watch.hear) for n, s in enumerate(specs)]))
        assert all(end.kind == "done" for _, end in ends), ends
        print(json.dumps({"case": name, **asdict(watch.done())}), flush=True)


def _note(module: Any, name: str, note: Callable[[float], None]) -> None:
    """Write down what is expected of a check with rows of 64 tokens, where a proof asks for one."""
    works = getattr(module, name)

    def noted(model: Any, *, tokens: int, factors: int) -> float:
        note(works(model, tokens=64, factors=factors))
        found: float = works(model, tokens=tokens, factors=factors)
        return found

    setattr(module, name, noted)


def _note_kept(module: Any, found: Measured) -> None:
    works = module.require

    def noted(*args: Any, numbers: int, **named: Any) -> None:
        found.kept = max(found.kept, module.FLOAT * numbers)
        works(*args, numbers=numbers, **named)

    module.require = noted


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
