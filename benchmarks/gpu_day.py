"""Everything to be checked and measured when a GPU is at hand: `make gpu-day`.

    python benchmarks/gpu_day.py [--only SECTION ...] [--write docs/speed-gpu.md]
    python benchmarks/gpu_day.py --device cpu --tiny        the same path on a processor: `make test` keeps it alive

Every section is a process of its own with a time limit, so that one that crashes the GPU, hangs or is wrong costs no
other. What checks runs beside other checks; what is timed runs alone. The page is written again after every section.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


@dataclass(frozen=True)
class Section:
    """`where`: the module of `benchmarks.gpu` and the function that says the lines; `seconds`: the most it may take."""

    name: str
    title: str
    where: tuple[str, str]
    seconds: float
    alone: bool = False


NO_GPU = 2  # exit code

# Cheapest and most telling first.
SECTIONS = [
    Section("machine", "The machine", ("kernels", "machine"), 60, alone=True),
    Section("attention", "Attention beside stock attention in float64", ("kernels", "attention"), 90),
    Section("dead-zone", "Small updates beside a large W·x", ("kernels", "dead_zone"), 60),
    Section("cases", "The pretended GPU's cases, on this one: `pytest -m gpu`", ("cases", "tests"), 480),
    Section("resume", "Resumed runs", ("jobs", "resume"), 120),
    Section("jobs-llama", "Every initialization on a tiny Llama", ("jobs", "llama"), 120),
    Section("jobs-gpt2", "Every initialization on a tiny GPT-2", ("jobs", "gpt2"), 120),
    Section("options", "Options and groups", ("jobs", "options"), 120),
    Section("processor", "The same run on the processor, in fp32", ("jobs", "processor"), 120),
    Section("nf4", "Bases in four bits", ("jobs", "nf4"), 90),
    Section("memory", "When memory runs out", ("jobs", "memory"), 90),
    Section("steps", "Steps", ("speed", "steps"), 120, alone=True),
    Section("groups", "Adapters together in one pass", ("speed", "groups"), 60, alone=True),
    Section("child", "A whole run of seven adapters on a base of 1B", ("child", "whole"), 150, alone=True),
]


def main() -> int:
    args = arguments()
    chosen = [section for section in SECTIONS if not args.only or section.name in args.only]
    if args.section:
        return inside(args)
    if args.device == "cuda" and not has_gpu():
        print(
            "Nothing was run: this needs a GPU that this torch can use, and there is none. `lorainit doctor` says why."
        )
        return NO_GPU
    texts: dict[str, str] = {}
    with ExitStack() as exits:
        folder = args.folder or Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="gpu-day-")))
        for section, text in outside(chosen, args, folder):
            texts[section.name] = text
            print(f"\n## {section.title}\n\n{text}", flush=True)
            if args.write:
                args.write.write_text(page(texts, args))
    bad = [name for name, text in texts.items() if "**" in text]
    print("\nEverything held." if not bad else f"\nLook at: {', '.join(bad)}")
    return 1 if bad else 0


def has_gpu() -> bool:
    """Asked of another process, since this one loads no torch."""
    asked = [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]
    return not subprocess.run(asked, stderr=subprocess.DEVNULL, check=False).returncode


def outside(chosen: Sequence[Section], args: argparse.Namespace, folder: Path) -> Iterator[tuple[Section, str]]:
    """Run sections in processes of their own; each with its text, in the order of `SECTIONS`."""
    checks = [section for section in chosen if not section.alone]
    # A process keeps about two cores busy: its own thread, and what loads and multiplies beside it.
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        first = next((section for section in chosen if section.alone), None)
        if first is chosen[0]:
            yield first, run(first, args, folder)
        yield from zip(checks, pool.map(lambda section: run(section, args, folder), checks), strict=True)
    for section in chosen:
        if section.alone and section is not chosen[0]:
            yield section, run(section, args, folder)


def run(section: Section, args: argparse.Namespace, folder: Path) -> str:
    """One section in a process of its own: what it said, and how it ended where that was no good end."""
    out, err = (folder / f"{section.name}.{kind}" for kind in ("md", "err"))
    (folder / section.name).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--section", section.name, "--folder", folder / section.name]
    command += ["--device", args.device, *(["--tiny"] if args.tiny else [])]
    own = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    own |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # what repeats bit by bit needs it from the start
    own |= {"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {}
    own |= {} if section.alone else {"OMP_NUM_THREADS": "2"}  # there are others beside it
    with out.open("w") as stdout, err.open("w") as stderr:
        code = run_for(section.seconds, command, stdout=stdout, stderr=stderr, env={**os.environ, **own})
    how = f"it did not end in {section.seconds:g} s" if code is None else ""
    if code:
        how = f"it ended with exit code {code}: {last_words(err)}"
    said = out.read_text(errors="replace").strip()
    return f"{said}\n\n**{how}**".strip() if how else said


def run_for(seconds: float, command: Sequence[str | Path], **more: Any) -> int | None:
    """Run a command; its exit code, or None where it did not end in time. Then nothing of it is left on the GPU."""
    with subprocess.Popen(command, **more) as process:
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            end(process)
            return None


def end(process: subprocess.Popen[Any]) -> None:
    """End a process and all that it started."""
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        with suppress(psutil.NoSuchProcess):
            one.kill()


def last_words(path: Path) -> str:
    """The end of a traceback: where in our own code, and what."""
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("File") and ("/lorainit/" in line or "/benchmarks/" in line)]
    return " | ".join([*ours[-2:], *lines[-1:]])[:600] or "it said nothing"


def inside(args: argparse.Namespace) -> int:
    """One section, in its own process."""
    from lorainit import machine

    section = next(one for one in SECTIONS if one.name == args.section)
    machine.set_up()  # as a run's own process does, before torch is loaded
    from benchmarks.gpu.day import Day

    day = Day.begun(args.device, folder=args.folder, tiny=args.tiny, seconds=section.seconds)
    module, function = section.where
    getattr(import_module(f"benchmarks.gpu.{module}"), function)(day)
    return 0


def page(texts: dict[str, str], args: argparse.Namespace) -> str:
    """docs/speed-gpu.md: what is fixed, then each section as it came; one that has not run, or not yet, says so."""
    parts = [f"## {section.title}\n\n{texts.get(section.name, 'Not run.')}" for section in SECTIONS]
    date = datetime.now(UTC).date().isoformat()
    where = f"Nothing was measured on a GPU: this run was on a processor, {date}, and shows that the command works."
    if args.device != "cpu":
        where = f"Measured {date} by `make gpu-day`."
    return f"{HEAD}\n{where}\n\n" + "\n\n".join(parts) + "\n"


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
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="new folder to work in and leave the sections' words in")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
