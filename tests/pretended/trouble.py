"""Operations of the pretended device that fail while a run is under way, for lack of memory or because it is broken.

`python -m tests.pretended.trouble FOLDER [POINTS]` does tiny whole runs over and over, lets another operation fail in
each, and prints a line of JSON for each: whatever fails, a run ends checked or says what the machine did. By hand, for
it takes minutes; exit code 1 where a run ended otherwise.
"""

import json
import shutil
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from tests.pretended import device, engine, layouts

if TYPE_CHECKING:  # the engine is read only when it is to take the device for CUDA
    from benchmarks.gpu.day import Day
    from lorainit.config.events import Event
    from lorainit.config.spec import RunSpec

How = Literal["memory", "no memory", "broken"]
NO_MEMORY = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 139.81 GiB"
BROKEN = "CUDA error: uncorrectable ECC error encountered\nCompile with `TORCH_USE_CUDA_DSA` for assertions."
# How a run that does not end checked has to end.
CODES = {"memory": "out_of_memory", "no memory": "out_of_memory", "broken": "device_failed"}
RUNS: dict[str, list[dict[str, Any]]] = {
    "gradients": [{"lora": {"init": "lora_ga", "r": 4}}],
    "activations": [{"lora": {"init": "eva", "r": 4}}],
    "two together": [{"lora": {"init": "kaiming", "r": 4}}, {"lora": {"init": "pissa", "r": 4}}],
}
# Where backward passes are: the try of packed rows, evidence, and the try and the steps of training.
BACKWARD = ("loading", "initializing", "training")


@dataclass
class Trouble:
    """What goes wrong, and when: at operation `at` of a stage (of all: None), or of its backward passes alone.

    `memory` runs out once, `no memory` is left from then on, and a `broken` device stays broken.
    """

    how: How = "memory"
    at: int = 0  # nothing goes wrong
    stage: str | None = None
    backward: bool = False
    seen: Counter[str] = field(default_factory=Counter)  # operations by stage
    struck: str = ""  # the stage in which it went wrong
    _now: str = ""

    def hear(self, event: "Event") -> None:
        """A listener of all runs of a process."""
        if event.kind == "stage":
            self._now = event.stage

    def strike(self) -> None:
        """Before each operation. Backward passes of a device have a thread of their own."""
        if self.backward and threading.current_thread() is threading.main_thread():
            return
        if self.stage not in (None, self._now):
            return
        self.seen[self._now] += 1
        count = self.seen.total()
        if not self.at or count < self.at or (self.how == "memory" and count > self.at):
            return
        self.struck = self.struck or self._now
        if self.how == "broken":
            device.fail(BROKEN)
        else:
            raise torch.OutOfMemoryError(NO_MEMORY)


@contextmanager
def _under_way(trouble: Trouble) -> Iterator[None]:
    device.watch(trouble.strike)
    try:
        yield
    finally:
        device.watch(None)
        device.fail(None)


def ends_of(specs: "list[RunSpec]", folder: Path, trouble: Trouble) -> list[str]:
    """How each run ended: "done" where its download was checked, else the code of its error."""
    from lorainit.config.errors import LorainitError
    from lorainit.context import RunRequest
    from lorainit.run import run_together

    requests = [RunRequest(spec, folder / f"{n}", trouble.hear) for n, spec in enumerate(specs)]
    ends = dict[int, str]()
    with _under_way(trouble):
        try:
            for who, end in run_together(requests):
                ends[who] = end.code if isinstance(end, LorainitError) else "done"
        except Exception as error:  # it is the end of all that have none
            rest = getattr(error, "code", f"{type(error).__name__}: {error}"[:200])
            ends = {who: ends.get(who, rest) for who in range(len(specs))}
    shutil.rmtree(folder, ignore_errors=True)
    return [ends[who] for who in range(len(specs))]


# --- cases: errors in backward passes ---------------------------------------------------------------


def no_memory_in_backward(day: "Day") -> str:
    """Memory runs out once: the run backs off."""
    return _in_backward(day, "memory", "done", "ends checked")


def never_memory_in_backward(day: "Day") -> str:
    """Memory is never there: whatever became smaller, the run says so."""
    return _in_backward(day, "no memory", "out_of_memory", "told as out_of_memory")


def fails_in_backward(day: "Day") -> str:
    """The GPU fails for good."""
    return _in_backward(day, "broken", "device_failed", "told as device_failed")


def _in_backward(day: "Day", how: How, wanted: str, words: str) -> str:
    from tests.lorainit.conftest import only_training

    told = list[str]()
    with only_training(), layouts.tried_once():  # "loading" comes first, and tries the layout itself
        for stage in BACKWARD:
            trouble = Trouble(how, at=3, stage=stage, backward=True)
            (end,) = ends_of(_specs(day, "gradients", max_steps=1), day.folder / stage, trouble)
            told.append(words if end == wanted and trouble.struck == stage else f"**{stage}: {end} {trouble.struck}**")
    return "; ".join(told)


def _specs(day: "Day", name: str, *, max_steps: int = 3) -> "list[RunSpec]":
    from benchmarks.gpu.jobs import Jobs

    jobs = Jobs(day)
    training = {"batch_size": 4, "checkpoint_interval": 2, "eval_interval": 2}
    return [
        jobs.spec(
            training=training | {"max_steps": max_steps + n}, data={"validation": str(jobs.rows)}, seed=n, **asked
        )
        for n, asked in enumerate(RUNS[name])
    ]


# --- the sweep --------------------------------------------------------------------------------------


def main(folder: Path, points: int) -> int:
    warnings.simplefilter("ignore")
    device.install()
    engine.install()
    wrong = 0
    with device.switched_on():
        for name in RUNS:
            wrong += sum(not right for right in _swept(name, folder / name.replace(" ", "-"), points))
    return int(wrong > 0)


def _swept(name: str, folder: Path, points: int) -> Iterator[bool]:
    from benchmarks.gpu.day import Day

    folder.mkdir(parents=True)
    specs = _specs(Day.begun("cpu", folder=folder, tiny=True, seconds=1e6), name)
    whole = Trouble()
    assert ends_of(specs, folder / "whole", whole) == ["done"] * len(specs)
    for stage, count in whole.seen.items():
        for at in sorted({max(1, count * (2 * n + 1) // (2 * points)) for n in range(points)}):
            yield _struck(specs, folder, Trouble("memory", at, stage))
            yield _struck(specs, folder, Trouble("broken", at, stage))


def _struck(specs: "list[RunSpec]", folder: Path, trouble: Trouble) -> bool:
    ends = ends_of(specs, folder / f"{trouble.how}-{trouble.stage}-{trouble.at}", trouble)
    code = CODES[trouble.how]
    # What stays broken ends at least the run that is at work; one of two may have been done before.
    right = set(ends) <= {"done", code} and bool(trouble.struck) and (trouble.how == "memory" or code in ends)
    told = {"run": folder.name, "stage": trouble.stage, "at": trouble.at, "how": trouble.how}
    print(json.dumps({**told, "ends": ends, "right": right}), flush=True)
    return right


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 4))
