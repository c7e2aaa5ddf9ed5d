"""What was measured, one JSON file for each experiment: its request, how far it is, and a line for each cell."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Measured:
    """What is known of one experiment.

    `digest`: of its request (`plan.compute_digest`); cells of another request are never mixed with it. `total`: jobs
    that the experiment has, those included that were added at the edges of the grid. `experiment`: its id in the
    service that measured it. `nice`: the lowest priority at which it ran. `facts`: what cells have in common; each cell
    has the place of its own.
    """

    key: str
    digest: str
    total: int
    status: str = "queued"
    experiment: str = ""
    nice: int = 0
    facts: list[dict[str, Any]] = field(default_factory=list)
    cells: list[dict[str, Any]] = field(default_factory=list)

    @property
    def job_ids(self) -> set[str]:
        """The jobs whose cells are here."""
        return {cell["job_id"] for cell in self.cells}

    def add(self, cell: dict[str, Any]) -> None:
        """Keep a cell, with what it has in common with others only once."""
        same = cell.pop("same")
        if same not in self.facts:
            self.facts.append(same)
        self.cells.append({**cell, "facts": self.facts.index(same)})


def save(measured: Measured, folder: Path) -> None:
    """Write an experiment's file. It is written beside and then renamed, so that a kill leaves no half of it."""
    folder.mkdir(parents=True, exist_ok=True)
    head = {name: value for name, value in vars(measured).items() if name != "cells"}
    cells = ",\n".join(json.dumps(cell, separators=(",", ":")) for cell in measured.cells)
    text = json.dumps(head)[:-1] + ', "cells": [\n' + cells + "\n]}\n"
    path = folder / f"{measured.key}.json"
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(path)


def load(folder: Path, key: str) -> Measured | None:
    """An experiment's file; None if there is none."""
    path = folder / f"{key}.json"
    return Measured(**json.loads(path.read_text())) if path.exists() else None


def load_all(folder: Path, keys: Sequence[str]) -> dict[str, Measured]:
    """The experiments that have a file, by key."""
    found = {key: load(folder, key) for key in keys}
    return {key: measured for key, measured in found.items() if measured is not None}
