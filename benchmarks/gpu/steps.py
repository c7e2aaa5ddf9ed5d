"""The steps that are measured, as rows of a table: which base, which rows, and whose step it is."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.day import Day, llama
from benchmarks.gpu.meter import Meter, operations

RANK = 16
HEAD = "| base | rows | who | ms a step | tokens/s | of peak | kernels | processor ms | peak GiB | waits |"
RULE = "|---" * HEAD.count(" | ") + "|---|"


@dataclass(frozen=True)
class Case:
    """Rows of one length in one pass; `again`: layers are computed again; `group`: adapters, each with such rows."""

    shape: str
    count: int
    length: int
    again: bool = False
    group: int = 1

    @property
    def rows(self) -> str:
        each = f"{self.group} adapters × " if self.group > 1 else ""
        return f"{each}{self.count} × {self.length}{', recomputed' if self.again else ''}"

    @property
    def tokens(self) -> int:
        return self.group * self.count * self.length


STEPS = [
    Case("135M", 8, 256),
    Case("135M", 64, 256),
    Case("1B", 8, 512),
    Case("8B", 8, 512),
    Case("8B", 2, 4096, again=True),
]
GROUPS = [Case("135M", 1, 256, group=8), Case("1B", 1, 512, group=8), Case("8B", 1, 512, group=8)]
Drive = Callable[[Day, Case, Any, Meter], None]  # makes as many steps on a base as the meter wants


@dataclass(frozen=True)
class Contender:
    """Whose step it is. `changes`: the base is no longer as it was afterwards."""

    name: str
    drive: Drive
    changes: bool = False


def table(day: Day, cases: Sequence[Case], contenders: Sequence[Contender]) -> None:
    """A row of every contender in every case."""
    bases = Bases(day)
    if not day.earlier:
        day.say(f"{HEAD}\n{RULE}")
    for case in cases:
        for who in contenders:
            name = f"{case.shape} | {case.rows} | {who.name}"
            day.attempt(name, lambda c=case, w=who: _row(day, bases, c, w), line="| {} | ", timed=False)


def _row(day: Day, bases: "Bases", case: Case, who: Contender) -> str:
    model = bases.get(case.shape)
    if who.changes or case.again:
        bases.forget()
    return measured(day, case, model, who.drive)


def measured(day: Day, case: Case, model: Any, drive: Drive) -> str:
    """The figures of a row."""
    meter = Meter(day)
    drive(day, case, model, meter)
    return meter.cells(tokens=case.tokens, operations=operations(model, tokens=case.tokens, length=case.length))


class Bases:
    """One random base at a time on the device, used again as long as nobody has changed it."""

    def __init__(self, day: Day) -> None:
        self.day, self.shape, self.model = day, "", None

    def get(self, shape: str) -> Any:
        if shape != self.shape:
            self.forget()
            gc.collect()
            if self.day.has_gpu:
                torch.cuda.empty_cache()
            self.model, self.shape = llama(shape, self.day.device, torch.bfloat16), shape
        return self.model

    def forget(self) -> None:
        self.model, self.shape = None, ""
