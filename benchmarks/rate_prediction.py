"""Can a measurement before the first step tell the learning rate, without a sweep?

    python -m benchmarks.rate_prediction --data GSM8K [--only kaiming pissa ...] [--sets gsm8k examples] [--seeds 0]
                                         [--results FOLDER] [--judge]

For each initialization on each data set it measures the start (`benchmarks.rate_first_update`) and sweeps rates
(`rate_cells`), and prints how well each form of `rate_fit` predicts. Results are kept in FOLDER, and a call that is cut
off goes on from them. `--judge` only prints what the results in FOLDER come to.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.rate_fit import FORMS, LOSS_ALLOWED, Judged, Pair, leave_one_out
from benchmarks.rate_records import KEPT_GAIN, next_step, read_cell, read_measures
from benchmarks.rates_rows import DATA_SETS
from lorainit.config.inits import INITS

ROOT = Path(__file__).parents[1]
FEW = ["kaiming", "pissa", "loram", "lora_ga", "gaussian", "lora_one", "orthogonal"]
LEGEND = f"""\
Gain: by how much the held-out loss falls below that of the untouched model. A prediction keeps the gain if its own gain
is at least {KEPT_GAIN:.0%} of the best swept rate's. It is near in loss if its loss is at most {LOSS_ALLOWED:.0%}
of the best swept rate's.
Between swept rates both are read off straight lines over the logarithm of the rate, and up to half a step beyond them
they are those of the outermost rate. A prediction further out is missed.
The constant of a form is fitted to the other methods (or data sets) only; the catalogue's rates have none."""


def main() -> None:
    """Measure what is missing, and judge."""
    args = arguments()
    if not args.judge:
        measure_all(args)
    found = pairs(args.results)
    print(page(found))


def measure_all(args: argparse.Namespace) -> None:
    """First narrow sweeps of all, then wide ones, so that what a call that is cut off has measured tells most."""
    from lorainit.runtime.process_tuning import tune_process

    tune_process()  # before torch is loaded
    from benchmarks.rate_cells import Sweeps

    sweeps = Sweeps(args.results, gsm8k=args.data)
    wanted = [(method, data, seed) for seed in args.seeds for data in args.sets for method in args.only]
    for widely in (False, True):
        for one in wanted:
            sweeps.measure(*one)
            sweeps.cell(*one, widely=widely)


def pairs(folder: Path) -> list[Pair]:
    """What has been swept until its best rate is between two others, and measured."""
    found = list[Pair]()
    for path in sorted((folder / "cells").glob("*.json")):
        cell, measured = read_cell(path), folder / "measures" / path.name
        if measured.exists() and cell.points and next_step(cell, widely=False) is None:
            found.append(Pair(cell, read_measures(measured)))
    return found


# --- the page ------------------------------------------------------------------------------------


def page(found: Sequence[Pair]) -> str:
    """The measurements, and how many pairs each form predicts."""
    lines = [
        *_measured(found),
        "",
        LEGEND,
        "",
        f"| {len(found)} pairs | over methods | over data sets |",
        "|---|---|---|",
    ]
    for name in FORMS:
        told = [_told(leave_one_out(name, found, group)) for group in GROUPS.values()]
        lines.append(f"| {name} | " + " | ".join(told) + " |")
    return "\n".join(lines)


GROUPS: dict[str, Callable[[Pair], str]] = {
    "over methods": lambda pair: pair.cell.method,
    "over data sets": lambda pair: pair.cell.data,
}


def _told(judged: Sequence[Judged]) -> str:
    kept, near = sum(one.keeps_gain for one in judged), sum(one.near_loss for one in judged)
    shares = [one.share for one in judged if one.share is not None]
    worst = f"{min(shares):.0%}" if len(shares) == len(judged) else "–"
    return f"{kept} keep the gain, {near} near in loss (worst: {worst} of the gain)"


def _measured(found: Sequence[Pair]) -> list[str]:
    head = "| | | best rate | catalogue | λ | λ min | g·u | uᵀHu | size | one update | loss |"
    lines = [head, "|---" * 11 + "|"]
    for pair in found:
        cell, m = pair.cell, pair.measures
        one = FORMS["c·(best single update)"](pair)
        numbers = (pair.best_rate, cell.catalogue, m.largest, m.smallest, m.slope, m.curvature, m.size, one)
        told = ["–" if number is None else f"{number:.3g}" for number in numbers]
        losses = f"{cell.base:.3f} → {cell.base - pair.best_gain:.3f}"
        lines.append(f"| `{cell.method}` | {cell.data} | " + " | ".join([*told, losses]) + " |")
    return lines


def arguments() -> argparse.Namespace:
    """What the command was asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--only", nargs="+", choices=list(INITS), default=FEW, help="these initializations")
    parser.add_argument("--sets", nargs="+", choices=DATA_SETS, default=list(DATA_SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--results", type=Path, default=ROOT / ".state" / "rate-prediction")
    parser.add_argument("--judge", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if not args.judge and "gsm8k" in args.sets and args.data is None:
        parser.error("say where GSM8K's train.jsonl and test.jsonl are: --data FOLDER")
    return args


if __name__ == "__main__":
    main()
