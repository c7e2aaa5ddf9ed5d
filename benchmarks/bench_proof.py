"""What proving the download costs: seconds of the proof and of the check beside those of a training step.

    python benchmarks/bench_proof.py [--steps 20] [--rank 16]

One job on SmolLM2-135M in fp32 on this machine's CPU, from its events: rows of `examples/train.jsonl`, 8 a step. The
job of 100 steps is these parts with a hundred of these steps. Ratios carry over to other machines better than seconds.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.init_cases import SOURCE  # noqa: E402
from lorainit.config.events import Event, Message, Metrics, Stage  # noqa: E402
from lorainit.config.spec import RunSpec  # noqa: E402
from lorainit.run import run  # noqa: E402


def measured(steps: int, rank: int, folder: str) -> dict[str, float]:
    """Seconds of each part of one job; "step" is the mean of all steps but the first."""
    times: dict[str, float] = {}
    seen: list[float] = []

    def say(event: Event) -> None:
        now = time.monotonic()
        if isinstance(event, Metrics):
            seen.append(now)
        if isinstance(event, Stage):
            times[event.stage] = now
        if isinstance(event, Message) and "proof" in event.data:
            times["proven"] = now
        if isinstance(event, Message) and "export_check" not in times and event.data.get("passed"):
            times["export_check"] = now

    run(spec(steps, rank, folder), Path(folder) / "out", say)
    end = time.monotonic()
    return {
        "proof": times["proven"] - times["initializing"],
        "initialization": times["training"] - times["proven"],
        "step": (seen[-1] - seen[0]) / (len(seen) - 1),
        "check": times["export_check"] - times["verifying"],
        "fidelity": end - times["export_check"],
    }


def spec(steps: int, rank: int, folder: str) -> RunSpec:
    value = {
        "model": {"id": "smollm2", "source": SOURCE, "root": "HuggingFaceTB/SmolLM2-135M-Instruct"},
        "data": {"training": str(ROOT / "examples" / "train.jsonl"), "validation": None},
        "lora": {"r": rank, "init": "kaiming"},
        "training": {"max_steps": steps, "batch_size": 8, "precision": "fp32"},
        "cache": folder,
    }
    return RunSpec.model_validate(value)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rank", type=int, default=16)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(asked.steps, asked.rank, folder)
    whole = sum(found.values()) + 99 * found["step"]
    print("| | seconds | steps | share of a job of 100 steps, loading aside |\n|---|---|---|---|")
    for name, seconds in found.items():
        share = (100 if name == "step" else 1) * seconds / whole
        print(f"| {name} | {seconds:.1f} | {seconds / found['step']:.1f} | {share:.1%} |")


if __name__ == "__main__":
    main()
