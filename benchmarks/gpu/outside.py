"""Runs the sections of `make gpu-day` from outside: each in a process of its own, watched, within the ten minutes.

A section writes a line as soon as it knows it, and the beginning of the line when a case begins. So one that hangs, or
that takes the process with it, loses its own line only: how it ended is written there, and another process goes on
with the next case. Loads no torch.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.gpu.plan import NOT_TRIED, Clock, Section, waves

ROOT = Path(__file__).parents[2]
DAY = ROOT / "benchmarks" / "gpu_day.py"
AGAIN = 75  # exit code of a section whose GPU no longer answers this process; it goes on in another
BEGUN = "begun"  # file in a section's folder: the names of the cases that were begun
LOOK = 0.1  # seconds between two looks at a process
LOADING = 30.0  # seconds more for the first case of a process, which loads torch first


@dataclass(frozen=True)
class Asked:
    """What of the command's arguments goes to every section."""

    device: str
    tiny: bool
    folder: Path


def outside(chosen: Sequence[Section], asked: Asked, clock: Clock) -> Iterator[tuple[Section, str]]:
    """Each section that was begun, with its text, in the order of the plan."""
    # A process keeps about two cores busy: its own thread, and what loads and multiplies beside it.
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        for wave in waves(chosen):
            texts = pool.map(lambda section: _begun(section, asked, clock), wave)
            yield from ((section, text) for section, text in zip(wave, texts, strict=True) if text is not None)


def _begun(section: Section, asked: Asked, clock: Clock) -> str | None:
    """The section's text; None where no time is left to begin it."""
    seconds = clock.given(section)
    return run(section, asked, seconds=seconds) if seconds else None


def run(section: Section, asked: Asked, *, seconds: float) -> str:
    """One section, in as many processes as it takes: what it said, and how it ended where that was no good end."""
    page = asked.folder / f"{section.name}.md"
    (asked.folder / section.name).mkdir(parents=True, exist_ok=True)
    page.touch()
    until = time.monotonic() + seconds
    while True:
        how = _process(section, asked, until=until, seconds=seconds)
        said = page.read_text(errors="replace")
        cut_off = bool(said) and not said.endswith("\n")  # in the middle of a case, whose line it is
        with page.open("a") as file:
            file.write(f"{'' if cut_off or not how else chr(10)}{how}\n" if how else "")
        if how is None or (how and not cut_off) or time.monotonic() > until:
            return page.read_text(errors="replace").strip()


def _process(section: Section, asked: Asked, *, until: float, seconds: float) -> str | None:
    """How one process ended: None is well, and nothing to say is that another one has to go on."""
    page, log = (asked.folder / f"{section.name}.{kind}" for kind in ("md", "err"))
    what = command(section, asked, seconds=until - time.monotonic())
    with page.open("a") as out, log.open("a") as err:
        streams = {"stdout": out, "stderr": err, "env": environment(section, asked)}
        ended = watched(what, page, until=until, each=section.each, **streams)
    if ended == "late":
        return f"{NOT_TRIED} to its end: {seconds:.0f} s were over"
    if ended == "hangs":
        return f"**it did not end in {section.each:g} s**"
    if ended == AGAIN:
        return ""
    return f"**its process ended with exit code {ended}: {last_words(log)}**" if ended else None


def command(section: Section, asked: Asked, *, seconds: float) -> list[str | Path]:
    """One section by `gpu_day.py`, which has so many seconds."""
    place = ["--section", section.name, "--folder", asked.folder / section.name, "--seconds", f"{seconds:.2f}"]
    return [sys.executable, DAY, *place, "--device", asked.device, *(["--tiny"] if asked.tiny else [])]


def environment(section: Section, asked: Asked) -> dict[str, str]:
    """The environment of a section's process."""
    own = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    own |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # what repeats bit by bit needs it from the start
    own |= {} if section.alone else {"OMP_NUM_THREADS": "2"}  # there are others beside it
    if asked.device == "cpu":
        own["CUDA_VISIBLE_DEVICES"] = ""
    elif not section.all_gpus:  # a trainer that sees several takes them all
        own["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return {**os.environ, **own}


def watched(what: Sequence[str | Path], page: Path, *, until: float, each: float, **more: Any) -> int | str:
    """Run a command: its exit code, "late" at the time `until`, "hangs" where the page did not grow for `each` seconds.

    Whatever it started ends with it, so that nothing of it is left on the GPU.
    """
    with subprocess.Popen(what, **more) as process:
        size, sign = page.stat().st_size, time.monotonic() + LOADING
        while process.poll() is None:
            now = time.monotonic()
            if now > until or now - sign > each:
                end(process)
                return "late" if now > until else "hangs"
            if page.stat().st_size != size:
                size, sign = page.stat().st_size, now
            with suppress(subprocess.TimeoutExpired):
                process.wait(LOOK)
        return process.returncode


def end(process: subprocess.Popen[Any]) -> None:
    """End a process and all that it started."""
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()


def last_words(path: Path) -> str:
    """The end of a traceback: where in our own code, and what."""
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("File") and ("/lorainit/" in line or "/benchmarks/" in line)]
    return " | ".join([*ours[-2:], *lines[-1:]])[:600] or "it said nothing"
