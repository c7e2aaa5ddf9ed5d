"""The sweeps of `rate_prediction`: one start of SmolLM2-135M is trained at many rates, all in one process.

The base is loaded once and an initialization is computed once; each rate begins from a copy of that start. A run is
that of `bench_rates` (16 steps of 8 short rows in bf16, everything else by default), with the library's own training
loop.
"""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.bench_rates import spec_of
from benchmarks.rate_measures import measure
from benchmarks.rate_records import PER_DECADE, Cell, Measures, Point, next_step, read_cell, read_measures, write_record
from benchmarks.rates_rows import write
from lorainit.config.errors import LorainitError, NonFiniteLoss
from lorainit.config.events import Event
from lorainit.config.spec import RunSpec
from lorainit.context import Run, RunRequest
from lorainit.init import stage
from lorainit.model.base import Base, open_base
from lorainit.model.layers.group import AdapterSlots
from lorainit.prepare import prepare
from lorainit.runtime import devices
from lorainit.runtime.distributed.world import join_world
from lorainit.train.adapter_trainer import AdapterTrainer
from lorainit.train.loop import evaluate, train
from lorainit.train.memory import fit_to_memory


class Sweeps:
    """One call of the command: the folder of results, and a base that all cells share."""

    def __init__(self, folder: Path, *, gsm8k: Path) -> None:
        self.folder, self.gsm8k = folder, gsm8k
        self.base: Base | None = None

    def cell(self, method: str, data: str, seed: int, *, widely: bool = True) -> Cell:
        """Complete a sweep, from what an earlier call has measured of it. `widely`: as for `next_step`."""
        kept = self.folder / "cells" / f"{method}-{data}-{seed}.json"
        cell = read_cell(kept) if kept.exists() else None
        if cell and next_step(cell, widely=widely) is None:
            return cell
        with self.started(method, data, seed) as run:
            cell = cell or _first_cell(run, method, data)
            while (step := next_step(cell, widely=widely)) is not None:
                point = _train(run, 10 ** (step / PER_DECADE))
                cell = replace(cell, points=sorted([*cell.points, point], key=lambda found: found.rate))
                write_record(kept, cell)
                told = "diverged" if point.end is None else f"{point.end:.4f}"
                print(
                    f"{method:10} {data:12} seed {seed} at {point.rate:7.2g}: {told} ({point.seconds:.0f} s)",
                    flush=True,
                )
        return cell

    def measure(self, method: str, data: str, seed: int) -> Measures:
        """What is known of a run before its first step, unless an earlier call has measured it."""
        kept = self.folder / "measures" / f"{method}-{data}-{seed}.json"
        if not kept.exists():
            with self.started(method, data, seed) as run:
                found = measure(run, method, data)
            write_record(kept, found)
            print(f"{method:10} {data:12} seed {seed} measured in {found.seconds:.0f} s", flush=True)
        return read_measures(kept)

    @contextmanager
    def started(self, method: str, data: str, seed: int) -> Iterator[Run]:
        """A run after its initialization, with no adapter attached."""
        training, held_out = write(data, self.folder / "rows", gsm8k=self.gsm8k)
        asked = spec_of(method, seed, None) | {"cache": str(self.folder / "cache")}
        asked["data"] = {"training": str(training), "validation": str(held_out)}
        spec, out = RunSpec.model_validate(asked), self.folder / "runs" / f"{method}-{data}-{seed}-{os.getpid()}"
        out.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.enter_context(devices.make_reproducible(seed, deterministic=spec.deterministic))
            world = stack.enter_context(join_world(devices.pick_device()))
            self.base = self.base or open_base(spec, out, _ignore, world=world)
            run = prepare(RunRequest(spec, out, _ignore), self.base)
            stage.start(run)
            fit_to_memory([run])
            yield run
        shutil.rmtree(out)


def _first_cell(run: Run, method: str, data: str) -> Cell:
    """A cell without rates, and the held-out losses before the first step."""
    assert run.training.learning_rate is not None
    start = _held_out_loss(run)
    base = run.report.summary["base_valid_loss"]
    return Cell(method, data, run.spec.seed, run.training.learning_rate, base or start, start, ())


def _held_out_loss(run: Run) -> float:
    assert run.valid is not None
    slots = AdapterSlots(run.model)
    try:
        return evaluate(slots, AdapterTrainer(run, write_adapter=_write_nothing), run.valid.samples)["valid_loss"]
    finally:
        slots.clear()


def _train(run: Run, rate: float) -> Point:
    """Train a copy of the run's start at this rate; the start itself is as before afterwards."""
    started, kept = time.monotonic(), [parameter.detach().clone() for parameter in run.parameters]
    # Without validation rows, so that they are evaluated at the end only and not before the first step of each rate.
    trial = replace(run, training=run.training.model_copy(update={"learning_rate": rate}), valid=None)
    try:
        (end,) = [end for ends in train([trial], [None], write_adapter=_write_nothing) for _, end in ends]
        if isinstance(end, LorainitError) and not isinstance(end, NonFiniteLoss):
            raise end
        loss = None if isinstance(end, NonFiniteLoss) else _held_out_loss(run)
    finally:
        with torch.no_grad():
            for parameter, value in zip(run.parameters, kept, strict=True):
                parameter.copy_(value)
        shutil.rmtree(run.out / "checkpoints", ignore_errors=True)
    return Point(rate, loss, time.monotonic() - started)


def _ignore(_event: Event) -> None:
    pass


def _write_nothing(_run: Run, _folder: Path) -> None:
    pass
