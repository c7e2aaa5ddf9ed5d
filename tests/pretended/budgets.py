"""What a training step asks of the pretended GPU, and of it each decoder layer: launches, waits, bytes that cross.

The same of an evaluation, here of three passes, and of a checkpoint.

`python -m tests.pretended.budgets [CASE ...]` counts and prints; `python -m tests.pretended.budgets --accept` writes
what is lower than before into budgets.json. What is higher it never writes: whoever has a reason for that writes it by
hand, and the reason into the commit.
"""

import argparse
import gc
import json
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.pretended import device, engine, layouts

BUDGETS = Path(__file__).with_name("budgets.json")
BASE = "counted"
Budget = dict[str, int]
# What is counted: from the first of two moments to the second. Of steps the third, when optimizers have their state.
MOMENTS = {
    "a step": ("metrics of step 2", "metrics of step 3"),
    "an evaluation": ("evaluating after step 1", "training after step 1"),
    "a checkpoint": ("metrics of step 3", "checkpoint of step 3"),
}
# The evaluation and the checkpoint of the first one have budgets of their own.
CASES: dict[str, dict[str, Any]] = {
    "bf16": {"validation": True, "eval_interval": 2, "micro_batch_size": 4, "checkpoint_interval": 3},
    "fp32": {"precision": "fp32"},
    "preconditioned AdamW": {"optimizer": {"name": "adamw_preconditioned"}},
    "LoRA+": {"optimizer": {"name": "adamw_lora_plus", "ratio": 16}},
    "DoRA": {"lora": {"use_dora": True}},
    "dropout": {"lora": {"dropout": 0.1}},
    "a start that is subtracted": {"lora": {"init": "pissa"}},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "two micro-batches": {"micro_batch_size": 2},
    "three adapters": {"members": 3},
    "options at once": {
        "precision": "fp32",
        "optimizer": {"name": "adamw_preconditioned"},
        "lora": {"use_dora": True, "dropout": 0.1},
        "gradient_checkpointing": True,
        "micro_batch_size": 2,
    },
    "adapters at once": {
        "members": 2, "optimizer": {"name": "adamw_lora_plus", "ratio": 16}, "lora": {"init": "pissa"},
    },
}  # fmt: skip
# Of `make test`. What rises in any other case rises in one of these as well; the others tell which option it was.
QUICK = ("bf16", "options at once", "adapters at once")
FEW, MORE = 1, 2  # layers


def count(case: str, folder: Path) -> dict[str, Budget]:
    """On two layers with seven adapted matrices each; `... a layer` is what the second one adds."""
    few, more = (_counted(case, folder, layers=layers) for layers in (FEW, MORE))
    return {case if name == "a step" else name: _with_layer(few[name], more[name]) for name in more}


def _with_layer(few: Budget, more: Budget) -> Budget:
    return {**more, **{f"{what} a layer": (more[what] - few[what]) // (MORE - FEW) for what in more}}


class _Watch:
    """What was counted at each moment of a run, which ends when all that is wanted has been."""

    def __init__(self, wanted: Sequence[str]) -> None:
        self.wanted, self.seen = {name: MOMENTS[name] for name in wanted}, dict[str, device.Tally]()
        self._step = 0

    def hear(self, event: Any) -> None:
        """A listener of the first run of a process."""
        from lorainit.config.errors import Stopped

        if event.kind in ("metrics", "checkpoint"):
            self._step = event.step
            self._note(f"{event.kind} of step {event.step}")
        elif event.kind == "stage":
            self._note(f"{event.stage} after step {self._step}")
        elif event.kind == "tick" and all(last in self.seen for _, last in self.wanted.values()):
            raise Stopped("All is counted.")

    def _note(self, moment: str) -> None:
        self.seen.setdefault(moment, replace(device.tally()))

    def budgets(self) -> dict[str, Budget]:
        """What was counted between each two moments that are wanted."""
        return {name: self._between(first, last) for name, (first, last) in self.wanted.items()}

    def _between(self, first: str, last: str) -> Budget:
        before, after = self.seen[first], self.seen[last]
        return {
            "launches": after.launches - before.launches,
            "waits": after.waits - before.waits,
            "bytes across": after.crossed - before.crossed,
        }


def _counted(case: str, folder: Path, *, layers: int) -> dict[str, Budget]:
    """Of a run on a base of so many layers; nothing before, between and after the moments is counted."""
    from benchmarks.gpu import jobs
    from lorainit.config.errors import Stopped
    from lorainit.context import RunRequest
    from lorainit.run import run_together
    from tests.lorainit.conftest import no_early_check

    asked = dict(CASES[case])
    watch = _Watch([*MOMENTS] if "validation" in asked else ["a step"])
    members = asked.pop("members", 1)
    lora = {"init": "kaiming", "r": 4, **asked.pop("lora", {})}
    more = {key: asked.pop(key) for key in ("micro_batch_size", "precision") if key in asked}
    their = jobs.Jobs(_day(folder, layers=layers))
    more["data"] = {"validation": str(their.rows)} if asked.pop("validation", False) else {}
    training = {"batch_size": 4, "max_steps": 4, "checkpoint_interval": 100, **asked}
    specs = [their.spec(BASE, lora=lora, training=training, seed=n, **more) for n in range(members)]
    listeners = [watch.hear, *[lambda _: None] * (members - 1)]
    out = folder / f"{case}-{layers}".replace(" ", "-")
    requests = [RunRequest(spec, out / f"{n}", listeners[n]) for n, spec in enumerate(specs)]
    with suppress(Stopped), no_early_check():
        list(run_together(requests))
    return watch.budgets()


def _day(folder: Path, *, layers: int) -> Any:
    """Where the base of so many layers lies: one for all cases, so that what is found out about it once serves all."""
    from benchmarks.gpu import jobs
    from benchmarks.gpu.day import Day
    from tests.lorainit.conftest import tiny_llama

    jobs.MAKERS[BASE] = lambda: tiny_llama(64, 128, num_hidden_layers=layers)
    place = folder / f"layers-{layers}"
    place.mkdir(parents=True, exist_ok=True)
    return Day.begun("cpu", folder=place, tiny=True, seconds=1e6)


def counted(cases: Sequence[str]) -> dict[str, Budget]:
    """In a process whose `lorainit` takes the pretended device for CUDA."""
    warnings.simplefilter("ignore")
    device.install()
    engine.install()
    import lorainit.run  # noqa: F401

    gc.freeze()  # a run collects garbage, and need not look at all that was imported
    with tempfile.TemporaryDirectory() as folder, device.switched_on(), layouts.tried_once():
        return {name: budget for case in cases for name, budget in count(case, Path(folder)).items()}


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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.pretended.budgets", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"one or more of: {', '.join(CASES)} (default: all)")
    parser.add_argument("--accept", action="store_true", help="write what is lower, and what is new; of all cases")
    args = parser.parse_args()
    if unknown := [case for case in args.cases if case not in CASES]:
        parser.error(f"there is no case {unknown[0]!r}; there are: {', '.join(CASES)}")
    if args.accept and args.cases:
        parser.error("--accept is for all cases at once: the file has all of them")
    found = counted(args.cases or list(CASES))
    if args.accept:
        BUDGETS.write_text(json.dumps(accept(found, known()), indent=2) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
