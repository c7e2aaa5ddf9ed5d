"""docs/rates.md: the table of default learning rates as the code has it, and what the default recipes came to."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from benchmarks.rates_rows import DATA_SETS
from benchmarks.train_page import machine
from lorainit.config.rates import RATES, SIZES

TABLE, RESULTS = "rates", "bench-rates"  # the places in docs/rates.md


@dataclass(frozen=True)
class Cell:
    """One run: its peak rate, the loss on the held-out rows before the first and after the last step, its seconds.

    `base`: loss of the untouched model, on the few training rows of the initialization's own check.
    """

    method: str
    data: str
    seed: int
    rate: float
    base: float
    start: float
    end: float
    seconds: float


# --- the table of the code -----------------------------------------------------------------------


def table() -> str:
    """All default rates, and below where each is from."""
    lines = [f"| | {' | '.join(SIZES)} |", "|---" * (1 + len(SIZES)) + "|"]
    lines += [f"| `{name}` | " + " | ".join(f"{rate.value:g}" for rate in row) + " |" for name, row in RATES.items()]
    lines += ["", "| | size | rate | from |", "|---|---|---|---|"]
    for name, row in RATES.items():
        for size, rate in zip(SIZES, row, strict=True):
            lines.append(f"| `{name}` | {size} | {rate.value:g} | {rate.source} |")
    return "\n".join(lines)


# --- what was measured ---------------------------------------------------------------------------


def results(cells: Sequence[Cell]) -> str:
    """Start and end of every method on every data set: the mean over the seeds, and the worst seed's change."""
    seeds = sorted({cell.seed for cell in cells})
    sets = [name for name in DATA_SETS if any(cell.data == name for cell in cells)]
    lines = [
        f"Measured {datetime.now(UTC):%Y-%m-%d} on {machine()}. Seeds: {', '.join(map(str, seeds))}.",
        "",
        "| | rate | " + " | ".join(sets) + " |",
        "|---" * (2 + len(sets)) + "|",
    ]
    for method in dict.fromkeys(cell.method for cell in cells):
        mine = [cell for cell in cells if cell.method == method]
        told = " | ".join(_told([cell for cell in mine if cell.data == name]) for name in sets)
        lines.append(f"| `{method}` | {mine[0].rate:g} | {told} |")
    worse = [cell for cell in cells if cell.end > cell.start]
    lines += ["", f"Runs that ended above their start: {len(worse)} of {len(cells)}."]
    lines += [f"- `{c.method}`, {c.data}, seed {c.seed}: {c.start:.3f} → {c.end:.3f}" for c in worse]
    return "\n".join(lines)


def _told(cells: Sequence[Cell]) -> str:
    if not cells:
        return "–"
    start, end = (statistics.mean(getattr(cell, name) for cell in cells) for name in ("start", "end"))
    worst = max(cell.end - cell.start for cell in cells)
    told = f"{start:.3f} → {end:.3f} (worst seed {worst:+.3f})"
    return f"**{told}**" if worst > 0 else told
