"""Everything to be checked and measured when a GPU is at hand, in ten minutes: `make gpu-day`.

    python benchmarks/gpu_day.py [--only SECTION ... | --write docs/speed-gpu.md]
    python benchmarks/gpu_day.py --device cpu --tiny        the same path on a processor: `make test` keeps it alive

`benchmarks/gpu/plan.py` says what is done and in which order. Every section is a process of its own with a time limit,
so that one that crashes the GPU, hangs or is wrong costs no other. The page is written again after every section.

Exit codes: 0 everything held; 1 something did not, and stands in bold; 2 there is no GPU, and nothing was run;
3 nothing was wrong, but something was not tried, for lack of time or of a package.
"""

import argparse
import os
import sys
import tempfile
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu.outside import Asked, outside  # noqa: E402
from benchmarks.gpu.plan import NO_GPU, SECTIONS, Clock, exit_code, not_tried, wrong  # noqa: E402
from lorainit.system.bounded_command import run_command  # noqa: E402

ANSWER_SECONDS = 60.0


def main() -> int:
    args = arguments()
    if args.section:
        return inside(args)
    clock = Clock()
    if args.device == "cuda" and not has_gpu():
        print(
            "Nothing was run: this needs a GPU that this torch can use, and there is none. `lorainit doctor` says why."
        )
        return NO_GPU
    chosen = [section for section in SECTIONS if not args.only or section.name in args.only]
    texts: dict[str, str] = {}
    with ExitStack() as exits:
        folder = args.folder or Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="gpu-day-")))
        for section, text in outside(chosen, Asked(args.device, args.tiny, folder), clock):
            texts[section.name] = text
            print(f"\n## {section.title}\n\n{text}", flush=True)
            if args.write:
                args.write.write_text(page(texts, args.device))
    print(f"\n{verdict(texts)}")
    return exit_code(chosen, texts)


def has_gpu() -> bool:
    """Asked of another process, since this one loads no torch, and a driver that hangs lets no caller go."""
    question = [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]
    answer = run_command(question, seconds=ANSWER_SECONDS)
    if answer is None:
        print(f"CUDA has not said within {ANSWER_SECONDS:.0f} seconds whether there is a GPU; its driver may hang.")
    return answer is not None and not answer.returncode


def inside(args: argparse.Namespace) -> int:
    """One section, in its own process."""
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries and other processes print is no part of the page
    from lorainit.runtime import process_tuning

    section = next(one for one in SECTIONS if one.name == args.section)
    process_tuning.tune_process()  # as a run's own process does, before torch is loaded
    from benchmarks.gpu.day import Day

    day = Day.begun(args.device, folder=args.folder, tiny=args.tiny, seconds=args.seconds, page=lines)
    module, function = section.where
    getattr(import_module(f"benchmarks.gpu.{module}"), function)(day)
    return 0


def page(texts: dict[str, str], device: str) -> str:
    """docs/speed-gpu.md: what is fixed, the verdict, then each section as it came or that it was not tried."""
    parts = [f"## {one.title}\n\n*{one.shows}*\n\n{texts.get(one.name, 'Not tried.')}" for one in SECTIONS]
    date = datetime.now(UTC).date().isoformat()
    where = f"Nothing was measured on a GPU: this run was on a processor, {date}, and shows that the command works."
    if device != "cpu":
        where = f"Measured {date} by `make gpu-day`."
    return f"{HEAD}\n{where}\n\n{verdict(texts)}\n\n" + "\n\n".join(parts) + "\n"


def verdict(texts: dict[str, str]) -> str:
    """What a reader wants to know first: what did not hold, and what is not known."""
    bad, missing = wrong(texts), not_tried(SECTIONS, texts)
    held = f"Something did not hold in: {', '.join(bad)}." if bad else "Everything that was tried held."
    return f"{held} Not tried, or not to the end: {', '.join(missing)}." if missing else held


HEAD = """# On a GPU

`make gpu-day` writes this page: checks first, then speed. Words in bold are what did not hold. Seconds and tokens
are of one run, on the machine named below; bases have random weights, so losses mean nothing.
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, and few cases of each kind")
    parser.add_argument("--only", nargs="+", choices=[section.name for section in SECTIONS])
    parser.add_argument("--write", type=Path, help="put what was found into this page")
    parser.add_argument("--folder", type=Path, help="new folder to work in and leave the sections' words in")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only and args.write:
        parser.error("--write replaces the whole page, and --only measures a part of it: leave one out")
    return args


if __name__ == "__main__":
    sys.exit(main())
