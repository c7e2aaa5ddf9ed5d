"""From measured runs to figures: speeds, ratios within a round, loss curves, goals. Arithmetic, nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

Row = dict[str, Any]
MIB = 2**20
WINDOW = 8  # steps; the noise of one batch of four rows hides what rounding does


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one run after its warm-up steps.

    `useful` and `all`: trained and non-padding tokens over all seconds, stalls included. `step`: the same for
    trained tokens in the median step, `quartiles` around it.
    """

    useful: float
    all: float
    step: float
    quartiles: tuple[float, float]


@dataclass(frozen=True)
class Ratio:
    """Median, smallest and largest of one ratio per round."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return (
            f"{self.middle:.2f}×" if self.low == self.high else f"{self.middle:.2f}× ({self.low:.2f}–{self.high:.2f})"
        )


@dataclass(frozen=True)
class Goal:
    """A sentence, what was measured (None: nothing was), and whether that is enough."""

    text: str
    told: str
    met: bool | None


def speed(row: Row, *, warmup: int) -> Speed:
    """Raises ValueError when fewer than two steps are left after the warm-up."""
    seconds, trained, tokens = (row[name][warmup:] for name in ("seconds", "trained", "tokens"))
    if len(seconds) < 2:
        raise ValueError(f"{len(row['seconds'])} steps leave fewer than two after {warmup} to warm up.")
    rates = [count / second for count, second in zip(trained, seconds, strict=True)]
    low, middle, high = quantiles(rates, n=4, method="inclusive")
    return Speed(sum(trained) / sum(seconds), sum(tokens) / sum(seconds), middle, (low, high))


def ratio(mine: dict[int, float], theirs: dict[int, float]) -> Ratio | None:
    """Mine over theirs in every round that has both; None when none has."""
    found = [mine[i] / theirs[i] for i in sorted(mine.keys() & theirs.keys())]
    return Ratio(median(found), min(found), max(found)) if found else None


def windows(losses: Sequence[float], size: int = WINDOW) -> list[float]:
    """Means of `size` steps, at every step that has so many behind it."""
    return [sum(losses[i : i + size]) / size for i in range(len(losses) - size + 1)]


def apart(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """(mean, largest) absolute difference of two curves of the same length."""
    found = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return sum(found) / len(found), max(found)


# --- goals -------------------------------------------------------------------------------------

FASTER = {"trl-defaults": 2.5, "trl-tuned": 1.8, "hf-bf16": 1.5}
MEMORY, CURVE_APART = 0.8, 0.005
TOLD = {"trl-defaults": "TRL's defaults", "trl-tuned": "TRL tuned", "hf-bf16": "HF Trainer + PEFT"}


def goals(runs: dict[str, dict[int, Row]], curve: dict[str, Row], *, warmup: int) -> list[Goal]:
    """The goals that were set, beside what was measured."""
    found = [_faster(runs, name, least, warmup=warmup) for name, least in FASTER.items()]
    return [*found, _smaller(runs), _close(curve)]


def by_round(runs: dict[str, dict[int, Row]], name: str, field: str, *, warmup: int) -> dict[int, float]:
    """A figure of `Speed` for every round that this contender has."""
    return {i: float(getattr(speed(row, warmup=warmup), field)) for i, row in runs.get(name, {}).items()}


def _faster(runs: dict[str, dict[int, Row]], name: str, least: float, *, warmup: int) -> Goal:
    text = f"bf16: ≥ {least}× the useful tokens per second of {TOLD[name]}"
    whole, step = (
        ratio(by_round(runs, "ours-bf16", field, warmup=warmup), by_round(runs, name, field, warmup=warmup))
        for field in ("useful", "step")
    )
    if not whole or not step:
        return Goal(text, "not measured", None)
    return Goal(text, f"{whole}; in the median step {step}", whole.middle >= least)


def _smaller(runs: dict[str, dict[int, Row]]) -> Goal:
    text = f"bf16: peak memory ≤ {MEMORY}× HF Trainer's"
    whole, training = (
        ratio(*({i: float(row[field]) for i, row in runs.get(name, {}).items()} for name in ("ours-bf16", "hf-bf16")))
        for field in ("peak", "peak_training")
    )
    if not whole or not training:
        return Goal(text, "not measured", None)
    return Goal(text, f"{whole} of the whole process; until the last step {training}", whole.middle <= MEMORY)


def _close(curve: dict[str, Row]) -> Goal:
    text = f"The bf16 loss curve within {CURVE_APART} of fp32's, means of {WINDOW} steps"
    if len(curve) < 2:
        return Goal(text, "not measured", None)
    one, other = (curve[name]["losses"] for name in ("bf16", "fp32"))
    smooth, raw = apart(windows(one), windows(other)), apart(one, other)
    told = f"{smooth[1]:.4f} at most, {smooth[0]:.4f} in the mean; single steps {raw[1]:.4f} and {raw[0]:.4f}"
    return Goal(f"{text}, {len(one)} steps", told, smooth[1] <= CURVE_APART)
