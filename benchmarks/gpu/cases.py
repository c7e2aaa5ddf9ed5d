"""The cases of the pretended GPU (`tests/pretended`) on the real one: the same list as `pytest -m gpu`."""

from dataclasses import replace

import torch

from benchmarks.gpu.day import Day, held
from tests.pretended.cases import BY_TWO, Case, cases_on
from tests.pretended.ends import ends_well


def cases(day: Day) -> None:
    """Each in a folder of its own, with what it found."""
    for name, case in _chosen(day).items():
        day.attempt(name, lambda n=name, c=case: _found(day, n, c))


def _chosen(day: Day) -> dict[str, Case]:
    if day.tiny:
        return {name: cases_on("cuda")[name] for name in ("dropout",)}
    if torch.cuda.device_count() > 1:
        return cases_on("cuda")
    day.say(f"- {', '.join(BY_TWO)}: for a machine with two GPUs")
    return {name: case for name, case in cases_on("cuda").items() if name not in BY_TWO}


def _found(day: Day, name: str, case: Case) -> str:
    folder = day.folder / name.replace(" ", "-")
    folder.mkdir()
    found = case(replace(day, folder=folder, tiny=True))
    return held(ends_well(found), found.replace("**", ""))
