"""From a claimed job to its first step: a process from scratch beside one that is forked from a warm one.

    python benchmarks/first_step.py [--rounds 3]

A tiny model (two layers) and twelve rows, through the worker's own supervisor, in turns. Seconds and processor seconds
(of the run's process alone) until each stage begins and the first step is told; what the warm process cost once is
told beside it. Ratios carry over to other machines better than seconds.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from api.core.devices.run_environment import make_environment_without_secrets  # noqa: E402
from lorainit.config.events import Event, Metrics, Stage  # noqa: E402
from worker.child.supervisor import RunPaths, run_child  # noqa: E402
from worker.child.warm import WarmProcess  # noqa: E402

MAKE = """
import sys
from pathlib import Path
from tests.lorainit.conftest import chat, make_tokenizer, tiny_llama, write_rows
folder = Path(sys.argv[1])
tiny_llama().save_pretrained(folder / "base")
make_tokenizer().save_pretrained(folder / "base")
words = "the cat sat on two mats and it is four my friend".split()
write_rows(folder / "rows.jsonl", [chat(f"What is {w}?", " ".join(words[: 2 + i])) for i, w in enumerate(words)])
"""
STAGES = ("loading", "initializing", "training", "first step", "end")


class Times(NamedTuple):
    """Since the start: seconds, and processor seconds of the run's processes."""

    wall: float
    cpu: float


def measured(folder: Path, warm: WarmProcess | None) -> dict[str, Times]:
    """One run."""
    started, found = time.monotonic(), dict[str, Times]()

    def note(name: str) -> None:
        found.setdefault(name, Times(time.monotonic() - started, sum(cpu_of_runs())))

    def take(event: Event) -> None:
        if isinstance(event, Stage):
            note(event.stage)
        if isinstance(event, Metrics):
            note("first step")
        if event.kind == "done":
            note("end")

    lease = folder / "lease"
    lease.write_text(repr(time.monotonic() + 600))
    with tempfile.TemporaryDirectory(dir=folder) as place:
        out = Path(place) / "out"
        places = [RunPaths(spec=folder / "spec.json", out=out, lease=lease)]
        outcome = run_child(places, grace=0, on_event=take, should_stop=lambda: "", warm=warm)
    assert outcome.returncode == 0, outcome.stderr_tail
    return found


def cpu_of_runs() -> Iterator[float]:
    """Of the processes below this one that are runs."""
    for child in psutil.Process().children(recursive=True):
        if "lorainit" in child.cmdline():
            used = child.cpu_times()
            yield used.user + used.system


def made_ready() -> tuple[WarmProcess, Times, int]:
    """A warm process, what it took, and the bytes that it alone holds."""
    warm, started = WarmProcess(), time.monotonic()
    warm.prepare({**make_environment_without_secrets(), "TOKENIZERS_PARALLELISM": "false"})
    while not warm.is_ready():
        time.sleep(0.05)
    assert warm.process is not None
    process = psutil.Process(warm.process.pid)
    used = process.cpu_times()
    return warm, Times(time.monotonic() - started, used.user + used.system), process.memory_full_info().uss


def prepare(folder: Path) -> None:
    """A tiny base, rows and a spec."""
    os.environ["PYTHONPATH"] = str(ROOT)
    import subprocess

    subprocess.run([sys.executable, "-c", MAKE, str(folder)], check=True, cwd=ROOT, capture_output=True)
    spec = {
        "model": {"id": "tiny", "source": str(folder / "base"), "root": "local:tiny"},
        "data": {"training": str(folder / "rows.jsonl"), "validation": None},
        "lora": {"r": 4, "init": "kaiming"},
        "training": {"max_steps": 5, "batch_size": 4, "max_length": 128},
        "cache": str(folder / "cache"),
    }
    (folder / "spec.json").write_text(json.dumps(spec))


def main() -> None:
    """Measure in turns and print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder)
        warm, cost, held = made_ready()
        try:
            runs = [(measured(folder, None), measured(folder, warm)) for _ in range(rounds)]
        finally:
            warm.close()
    print("| until | from scratch | forked | |\n|---|---:|---:|---:|")
    for stage in STAGES:
        cells = []
        for part in (0, 1):
            wall, cpu = (statistics.median(run[part][stage][i] for run in runs) for i in (0, 1))
            cells.append((f"{wall:.2f} s ({cpu:.2f} of a processor)", cpu, wall))
        print(f"| {stage} | {cells[0][0]} | {cells[1][0]} | {cells[0][2] / cells[1][2]:.1f}× |")
    print(f"\nOnce per slot: {cost.wall:.1f} s ({cost.cpu:.1f} of a processor) and {held >> 20} MiB of its own.")


if __name__ == "__main__":
    main()
