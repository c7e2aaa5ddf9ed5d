"""Seconds and memory of every initialization, beside stock PEFT's, in one run on one machine.

    python benchmarks/bench_init.py [--limit 180] [--rank 16] [--only model|layer] [--write docs/methods/benchmark.md]

Each measurement has a process of its own, one core and a time limit; what does not end is listed with the
reason. Seconds are processor time, which other work on the machine disturbs least. Memory is the peak above
what the process held just before. Two settings: SmolLM2-135M (210 matrices)
with rows of `examples/train.jsonl`, evidence included, and one 4096x11008 float32 layer by itself.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.init_cases import CASES, ON_A_LAYER, OURS, PEFT, base  # noqa: E402
from benchmarks.init_page import report  # noqa: E402


def measured(setting: str, who: str, name: str, *, args: argparse.Namespace, cache: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--rank", str(args.rank), "--child", setting, who, name, cache]
    try:
        one_core = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.limit, check=False, env=one_core)
    except subprocess.TimeoutExpired:
        return {"skipped": f"did not end in {args.limit:g} s"}
    if done.returncode:
        return {"skipped": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:160]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=180.0, help="seconds one measurement may take, loading included")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--only", choices=["model", "layer"])
    parser.add_argument("--write", type=Path, help="write the tables to this page")
    parser.add_argument(
        "--results", type=Path, help="JSON lines of what is measured; a run that is cut off goes on from it"
    )
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        setting, who, name, cache = args.child
        warnings.simplefilter("ignore")
        print(json.dumps(CASES[setting, who](name, args.rank, cache)))
        return
    before, found = earlier(args.results), {}
    with tempfile.TemporaryDirectory() as cache:
        if args.only != "layer":
            base(cache)  # converts the GGUF file once
        for key in wanted(args.only):
            if key not in before:
                before[key] = measured(*key, args=args, cache=cache)
                print("{:6} {:5} {:26}".format(*key), shown(before[key]), flush=True)
                if args.results:
                    with args.results.open("a") as file:
                        file.write(json.dumps([key, before[key]]) + "\n")
            found[key] = before[key]
    page = report(found, args)
    print("\n" + page)
    if args.write:
        args.write.write_text(page)


def wanted(only: str | None) -> list[tuple[str, str, str]]:
    """(setting, who, method) of all measurements, in the page's order."""
    cases = {"model": {"ours": list(OURS), "peft": PEFT}, "layer": ON_A_LAYER}
    return [
        (setting, who, name)
        for setting, sides in cases.items()
        if only in (None, setting)
        for who, names in sides.items()
        for name in names
    ]


def earlier(path: Path | None) -> dict[tuple[str, str, str], dict[str, Any]]:
    """What an earlier run wrote."""
    if path is None or not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {(setting, who, name): row for (setting, who, name), row in rows}


def shown(row: dict[str, Any]) -> str:
    if "skipped" in row:
        return f"skipped: {row['skipped']}"
    return f"{row['seconds']:9.3f} s {row['bytes'] / 2**20:8.0f} MiB"


if __name__ == "__main__":
    main()
