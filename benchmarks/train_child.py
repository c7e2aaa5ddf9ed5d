"""Starts one run of a contender in a process of its own, and brings home what it was measured at.

Loads no torch: a child begins with its parent's peak of memory, as Linux counts it.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.train_plan import ALLOCATOR, Rival, Work, rival_arguments, spec

ROOT = Path(__file__).parents[1]
# Ours to set, the same for all: what happens to be exported where the benchmark is started does not count.
OWN = ("MALLOC_", "OMP_", "GOMP_", "MKL_", "ONEDNN_", "PYTHONPATH", "HF_", "CUDA_VISIBLE_DEVICES")


class Failed(Exception):
    """A run that ended badly or took too long; the message is the table's."""


@dataclass(frozen=True)
class Place:
    """Where things are: the prepared rows and base, both interpreters, threads (None: as many as there are cores)."""

    rows: Path
    competitors: Path
    limit: float
    threads: int | None = None


def ours(work: Work, precision: str, place: Place, out: Path) -> dict[str, Any]:
    """`python -m lorainit`, as a user starts it; times and tokens come from its events."""
    wanted = spec(
        work, precision, base=(place.rows / "base").resolve(), rows=place.rows / "train.jsonl", cache=out / "cache"
    )
    seen, started = run_ours(wanted, place, out)
    metrics = [event for event in seen if event["kind"] == "metrics" and event["train_loss"] is not None]
    done = seen[-1]
    rows = json.loads((place.rows / "rows.json").read_text())
    return {
        "seconds": _steps([event["seconds"] for event in metrics]),
        "processor": _steps([event["processor"] for event in metrics]),
        "tokens": agreed([len(row["input_ids"]) for row in rows], [e["tokens"] for e in metrics], work.batch),
        "trained": _by_step([sum(label >= 0 for label in row["labels"]) for row in rows], work.batch),
        "losses": [event["train_loss"] for event in metrics],
        "first_step": metrics[0]["at"] - started,
        "peak_training": next(e["peak"] for e in seen if e["kind"] == "stage" and e["stage"] == "exporting"),
        "peak": done["resources"]["peak_memory_bytes"],
        "adapter": done["adapter"],
    }


def run_ours(wanted: dict[str, Any], place: Place, out: Path) -> tuple[list[dict[str, Any]], float]:
    """The events of `python -m lorainit` (`_watched`), and the moment at which its process was started.

    Raises:
        Failed: it did not succeed.
    """
    out.mkdir(parents=True)
    (out / "spec.json").write_text(json.dumps(wanted))
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "lorainit", out / "spec.json", out / "run", "--events-fd", str(writing)]
    with _running(command, place, out, machine=True, fds=(writing,)) as child:
        os.close(writing)
        with os.fdopen(reading) as stream:
            seen = list(_watched(stream, child.pid))
        started = child.started
    if not seen or seen[-1]["kind"] != "done":
        raise Failed(f"its last event is {seen[-1] if seen else 'none'}")
    return seen, started


def rival(work: Work, who: Rival, place: Place, out: Path) -> dict[str, Any]:
    """A competitor in the competitors' environment."""
    out.mkdir(parents=True)
    order = {
        **asdict(who), "arguments": rival_arguments(work, who, out=out / "run"), "r": work.r, "alpha": work.alpha,
        "base": str((place.rows / "base").resolve()), "rows": str(place.rows / "rows.json"),
        "adapter": str(out / "adapter"),
    }  # fmt: skip
    (out / "order.json").write_text(json.dumps(order))
    command = [place.competitors, ROOT / "benchmarks/train_rivals.py", out / "order.json", out / "result.json"]
    with _running(command, place, out, machine=who.machine) as child:
        started = child.started
    found: dict[str, Any] = json.loads((out / "result.json").read_text())
    return {**found, "first_step": found["first_step"] - started, "adapter": order["adapter"]}


def helper(script: str, *arguments: str | Path) -> str:
    """What one of our own scripts prints last."""
    command = [sys.executable, ROOT / "benchmarks" / script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment({}))
    if done.returncode:
        raise Failed(_last_line(done.stderr))
    return (done.stdout.strip().splitlines() or [""])[-1]


@dataclass(frozen=True)
class _Child:
    pid: int
    started: float


@contextmanager
def _running(
    command: list[Any], place: Place, out: Path, *, machine: bool, fds: tuple[int, ...] = ()
) -> Iterator[_Child]:
    """Start, let the caller listen, wait; too long or a bad exit code is `Failed`."""
    threads = {"OMP_NUM_THREADS": str(place.threads)} if place.threads else {}
    env = _environment({**(ALLOCATOR if machine else {}), **threads, "HF_HOME": str(out / "hf")})
    with (out / "log.txt").open("w") as log:
        started = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log, pass_fds=fds)
        timer = threading.Timer(place.limit, process.kill)
        timer.start()
        try:
            yield _Child(process.pid, started)
            code = process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.wait()
    if time.monotonic() - started >= place.limit:
        raise Failed(f"did not end in {place.limit:g} s")
    if code:
        raise Failed(f"exit code {code}: {_last_line((out / 'log.txt').read_text())}")


def _environment(more: dict[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OWN)}
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": tempfile.gettempdir(), "TOKENIZERS_PARALLELISM": "false"}
    return {**kept, **offline, "CUDA_VISIBLE_DEVICES": "", **more}


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1][:160]


# --- our own events ------------------------------------------------------------------------------


def _watched(stream: Any, pid: int) -> Iterator[dict[str, Any]]:
    """Its events with the moment they came (`at`) and the `processor` seconds until then.

    At each stage also the most memory it has held (`peak`).
    """
    for line in stream:
        used = psutil.Process(pid).cpu_times()
        event = {**json.loads(line), "at": time.monotonic(), "processor": used.user + used.system}
        if event["kind"] == "stage":
            event["peak"] = _peak(pid)
        yield event


def _peak(pid: int) -> int:
    """Bytes; 0 of a process that has just died, which its missing last word will tell."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def _steps(until: list[float]) -> list[float]:
    """What each step took, from sums since training began."""
    return [after - before for before, after in zip([0.0, *until], until, strict=False)]


def _by_step(counts: list[int], batch: int) -> list[int]:
    return [sum(counts[i : i + batch]) for i in range(0, len(counts), batch)]


def agreed(counts: list[int], reported: list[int], batch: int) -> list[int]:
    """Tokens of each step by the prepared rows' `counts`, which the run's own sums have to agree with.

    Raises:
        Failed: they do not, so the comparison would not be one.
    """
    steps = _by_step(counts, batch)
    if _steps([float(x) for x in reported]) != steps:
        raise Failed("it took other rows, or in another order, than were prepared for everybody")
    return steps
