"""The grid of an experiment: one cell for each initialization, rank, learning rate and seed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_CELLS = 256  # jobs of one experiment, as the contract sets it


@dataclass(frozen=True)
class GridCell:
    """One place of the grid. `init`: the place of its initialization in the grid's list."""

    number: int
    name: str
    init: int
    rank: int
    learning_rate: float
    seed: int


def list_cells(
    inits: Sequence[Mapping[str, Any]],
    *,
    ranks: Sequence[int],
    rates: Sequence[Sequence[float]],
    seeds: Sequence[int],
) -> list[GridCell]:
    """Every cell of the grid, seed by seed.

    Seeds come first, so that an experiment that is stopped early has compared all initializations on some seeds, and so
    that jobs which can share a forward pass stand next to each other in the queue.

    Args:
        rates: for each initialization its learning rates.
    """
    names = list(_name_inits(inits))
    places = (
        (init, rank, rate, seed)
        for seed in seeds
        for rank in ranks
        for init in range(len(inits))
        for rate in rates[init]
    )
    return [
        GridCell(number, _name_cell(names[init], rank if len(ranks) > 1 else None, rate, seed), init, rank, rate, seed)
        for number, (init, rank, rate, seed) in enumerate(places)
    ]


def _name_inits(inits: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The name of each method, with a number from the second initialization with that method on."""
    seen = dict[str, int]()
    for init in inits:
        method = str(init["method"])
        seen[method] = seen.get(method, 0) + 1
        yield method if seen[method] == 1 else f"{method}-{seen[method]}"


def name_inits(inits: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each initialization of a grid, unique in it."""
    return list(_name_inits(inits))


def _name_cell(init: str, rank: int | None, rate: float, seed: int) -> str:
    middle = "" if rank is None else f"r{rank}/"
    return f"{init}/{middle}{rate:g}/{seed}"
