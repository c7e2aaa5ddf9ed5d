"""Training speed of Lorainit beside TRL's SFTTrainer and HF Trainer + PEFT: one command, one run, one machine.

    python benchmarks/bench_train.py --data GSM8K [--rounds 2] [--steps 20] [--only ours-bf16 hf-bf16 curve ...]
                                     [--results FILE.jsonl] [--write docs/speed.md]

GSM8K is a folder with the data set's train.jsonl and test.jsonl as they are published. Every run is a process of its
own; contenders take turns, forwards and backwards. docs/speed.md says what is equal and what is not.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.train_child import Failed, Place, helper, ours, rival  # noqa: E402
from benchmarks.train_environment import competitors  # noqa: E402
from benchmarks.train_figures import Row, speed  # noqa: E402
from benchmarks.train_page import report, section, write_section  # noqa: E402
from benchmarks.train_plan import (  # noqa: E402
    CURVE,
    CURVE_STEPS,
    DEFAULTS,
    NAMES,
    ONCE,
    OURS,
    QUALITY,
    ROUND,
    TRYOUTS,
    Rival,
    Work,
    order,
)
from benchmarks.train_quality import RIVAL, measure_init, measure_rival  # noqa: E402
from lorainit.config.inits import INITS  # noqa: E402

PLACE = "bench-train"  # in docs/speed.md
Key = tuple[str, str, int]  # part of the benchmark, contender or setting, round


class Bench:
    """One call of the command: what was measured so far, and where the prepared rows lie."""

    def __init__(self, args: argparse.Namespace, temporary: Path) -> None:
        self.args, self.temporary = args, temporary
        self.work = Work(steps=args.steps, batch=args.batch)
        self.found = earlier(args.results, settings(args))
        self.competitors = competitors()

    def place(self, work: Work) -> Place:
        """The rows of this much work, prepared when they are first asked for; without them nothing can be measured."""
        rows = self.temporary / f"rows-{work.rows}"
        if not rows.exists():
            cache = ROOT / ".state" / "bench-train"
            wanted = (str(x) for x in (work.rows, work.seed, work.max_length))
            try:
                helper("train_rows.py", self.args.data, rows, *wanted, cache)
            except Failed as error:
                raise SystemExit(f"The rows cannot be prepared: {error}") from error
        return Place(rows, self.competitors, self.args.limit, self.args.threads)

    def run(self, key: Key, who: Rival | str, work: Work) -> Row:
        """Measure, unless an earlier call did; what fails is a row that says why."""
        if key not in self.found:
            place = self.place(work)
            out = self.temporary / "-".join(str(part).replace(" ", "_") for part in key)
            try:
                self.found[key] = measured(who, work, place, out, judged=key[0] == "round" and key[2] == 0)
                speed(self.found[key], warmup=self.args.warmup)  # packing can leave too few steps to have one
            except (Failed, ValueError) as error:
                self.found[key] = {"skipped": str(error)}
            print("{:7} {:34} {:2d}".format(*key), shown(self.found[key], self.args.warmup), flush=True)
            keep(self.args.results, key, self.found[key])
        return self.found[key]

    def tried(self, name: str) -> Rival | None:
        """The fastest setting of a tuned competitor; None when none ran to its end."""
        work = replace(self.work, steps=self.args.tryout_steps)
        rows = {setting: self.run((name, setting, 0), who, work) for setting, who in TRYOUTS[name].items()}
        speeds = {k: speed(row, warmup=self.args.warmup).useful for k, row in rows.items() if "skipped" not in row}
        return TRYOUTS[name][max(speeds, key=lambda k: speeds[k])] if speeds else None

    def rounds(self, wanted: Callable[[str], bool]) -> None:
        """All contenders in turn; one that fails is not tried again."""
        who: dict[str, Rival | str | None] = {**OURS, **DEFAULTS}
        who |= {name: self.tried(name) for name in TRYOUTS if wanted(name)}
        if wanted(ONCE):
            self.run(("round", ONCE, 0), DEFAULTS[ONCE], self.work)
        failed = {name for name in ROUND if who.get(name) is None}
        for i, name in order([name for name in ROUND if wanted(name)], rounds=self.args.rounds):
            contender = who.get(name)
            if name not in failed and contender and "skipped" in self.run(("round", name, i), contender, self.work):
                failed.add(name)

    def curve(self) -> None:
        """Our own loss in both formats over the same batches."""
        for precision in OURS.values():
            self.run((CURVE, precision, 0), precision, replace(self.work, steps=CURVE_STEPS))

    def quality(self) -> None:
        """How long each initialization takes to the loss that TRL's defaults end with."""
        work = replace(self.work, steps=CURVE_STEPS)
        plain = [name for name, kind in INITS.items() if None in kind.facts.quantization]
        for name in (RIVAL, *plain):
            key = (QUALITY, name, 0)
            if key in self.found:
                continue
            out = self.temporary / f"{QUALITY}-{name}"
            try:
                place = self.place(work)
                row = measure_rival(work, place, out) if name == RIVAL else measure_init(work, name, place, out)
            except Failed as error:
                row = {"skipped": str(error)}
            print(f"{QUALITY:7} {name:34} {row.get('skipped') or row.get('loss') or row['curve'][-1]}", flush=True)
            self.found[key] = row
            keep(self.args.results, key, row)


def measured(who: Rival | str, work: Work, place: Place, out: Path, *, judged: bool) -> Row:
    """One run of a rival, or of ours in a precision; `judged`: with its adapter's held-out loss."""
    row = rival(work, who, place, out) if isinstance(who, Rival) else ours(work, who, place, out)
    if judged:
        row["held_out"] = float(helper("train_judge.py", place.rows / "base", place.rows / "held.json", row["adapter"]))
    return row


# --- results that outlive a call ---------------------------------------------------------------


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What has to be the same for two calls' figures to belong together."""
    return {
        "work": asdict(Work(steps=args.steps, batch=args.batch)), "warmup": args.warmup,
        "tryout_steps": args.tryout_steps, "threads": args.threads,
    }  # fmt: skip


def earlier(path: Path | None, wanted: dict[str, Any]) -> dict[Key, Row]:
    """What earlier calls with the same settings wrote; a new file begins with the settings.

    Raises:
        SystemExit: the file is of other settings.
    """
    if path is None:
        return {}
    if not path.exists():
        path.write_text(json.dumps(wanted) + "\n")
    first, *rows = (json.loads(line) for line in path.read_text().splitlines())
    if first != wanted:
        raise SystemExit(f"{path} was measured with other settings ({first}): name another file.")
    return {(part, name, number): row for (part, name, number), row in rows}


def keep(path: Path | None, key: Key, row: Row) -> None:
    if path:
        with path.open("a") as file:
            file.write(json.dumps([key, row]) + "\n")


def shown(row: Row, warmup: int) -> str:
    if "skipped" in row:
        return f"skipped: {row['skipped']}"
    found = speed(row, warmup=warmup)
    text = f"{found.useful:7.0f} useful tokens/s, in the median step {found.step:5.0f}; {row['peak'] / 2**20:6.0f} MiB"
    if "processor" in row:  # of our own runs only: a competitor tells nothing while it trains
        text += f"; {fmean(row['processor'][warmup:]):.2f} s of a processor a step"
    return text


def main() -> None:
    args = arguments()
    if not (args.data / "train.jsonl").exists() or not (args.data / "test.jsonl").exists():
        raise SystemExit(f"{args.data} has no train.jsonl and test.jsonl, GSM8K's files.")
    if args.write:
        section(args.write, PLACE)  # before half an hour of work for a page that has no place for it
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(args, Path(temporary))
        bench.rounds(lambda name: args.only is None or name in args.only)
        if args.only is None or CURVE in args.only:
            bench.curve()
        if args.only is None or QUALITY in args.only:
            bench.quality()
    text = report(bench.found, bench.work, warmup=args.warmup, threads=args.threads)
    print("\n" + text)
    if args.write:
        write_section(args.write, PLACE, text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with GSM8K's files")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of a run, the warm-up included")
    parser.add_argument("--warmup", type=int, default=3, help="first steps that are not counted")
    parser.add_argument("--tryout-steps", type=int, default=9, help="steps for trying a competitor's settings")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--threads", type=int, help="threads of every contender (default: its own choice)")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds one run may take")
    parser.add_argument(
        "--only", nargs="+", choices=[*NAMES, CURVE, QUALITY], help="these contenders, the curve, or time to quality"
    )
    parser.add_argument("--results", type=Path, help="JSON lines; a call that is cut off goes on from them")
    parser.add_argument("--write", type=Path, help="put the figures into this page")
    return parser.parse_args()


if __name__ == "__main__":
    main()
