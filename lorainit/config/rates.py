"""Default learning rates by initialization and model size, each with its source. Loads no torch.

`docs/rates.md` shows this table; `make bench-rates` measures the first column. The rates are AdamW's peak rates at the
method's recommended alpha. They differ by a factor of a hundred because AdamW's steps have a fixed size: factors that
start as large as the weight need a much smaller rate for the same relative change.
"""

import math
from dataclasses import dataclass

from lorainit.config.inits import InitConfig

# The columns, and how many numbers the linear layers of such a base hold (SmolLM2-135M, Llama-2-7B, LLaMA-33B).
SIZES = {"135M": 1.06e8, "7B": 6.48e9, "33B": 3.21e10}


@dataclass(frozen=True)
class Rate:
    """A peak rate and its source."""

    value: float
    source: str


Row = tuple[Rate, Rate, Rate]  # a rate for each of SIZES

_QLORA = "QLoRA (arXiv 2305.14314)"
_AS_KAIMING = "ours: `kaiming`'s"
_IN_KAIMINGS_RATIO = "ours: half of 7B's, as `kaiming`'s"
_AS_PISSA = "ours: `pissa`'s"
_BY_ROWS = "ours: `kaiming`'s, divided by how much longer the rows of A are ({})"
_MEASURED = "ours, measured: {}"

RATES: dict[str, Row] = {
    "kaiming": (
        Rate(1e-3, _MEASURED.format("docs/log.md")),
        Rate(2e-4, f"{_QLORA}, for 7B and 13B"),
        Rate(1e-4, f"{_QLORA}, for 33B and 65B"),
    ),
    "gaussian": (
        Rate(4e-4, _BY_ROWS.format("√n/r = 1.5 against 0.58 at r 16")),
        Rate(3e-5, _BY_ROWS.format("4 against 0.58 at r 16")),
        Rate(1e-5, _BY_ROWS.format("5 against 0.58 at r 16")),
    ),
    "orthogonal": (Rate(1e-3, _AS_KAIMING), Rate(2e-4, _AS_KAIMING), Rate(1e-4, _AS_KAIMING)),
    "pissa": (
        Rate(2e-4, _MEASURED.format("docs/log.md")),
        Rate(2e-5, "the authors' script for Llama-2-7B: r = alpha = 128, batch 128"),
        Rate(1e-5, _IN_KAIMINGS_RATIO),
    ),
    "milora": (
        Rate(1e-3, _AS_KAIMING),
        Rate(3e-4, "the authors' script for Llama-2-7B: r = alpha = 64, batch 16"),
        Rate(1.5e-4, _IN_KAIMINGS_RATIO),
    ),
    "olora": (Rate(2e-4, _MEASURED.format("docs/log.md")), Rate(2e-5, _AS_PISSA), Rate(1e-5, _AS_PISSA)),
    "loram": (
        Rate(2e-4, _MEASURED.format("docs/log.md")),
        Rate(2e-5, "arXiv 2507.06558, language generation: PiSSA's setting, Llama-2-7B, batch 128"),
        Rate(1e-5, _IN_KAIMINGS_RATIO),
    ),
    "lora_ga": (
        Rate(1e-4, "the authors' configuration for T5-base (220M): batch 32"),
        Rate(1e-5, "the authors' configuration for Llama-2-7B: r 8, alpha 16, batch 32"),
        Rate(5e-6, _IN_KAIMINGS_RATIO),
    ),
    "lora_one": (
        Rate(1e-3, _AS_KAIMING),
        Rate(2e-4, "the authors' README for Llama-2-7B: r 8, alpha 16, rsLoRA"),
        Rate(1e-4, _IN_KAIMINGS_RATIO),
    ),
    "lora_one v1": (
        Rate(1e-4, "the authors' configuration for T5-base (220M)"),
        Rate(2e-5, "the authors' README of the first version, for Llama-2-7B"),
        Rate(1e-5, _IN_KAIMINGS_RATIO),
    ),
    "hrp": (
        Rate(6e-4, _BY_ROWS.format("1 against 0.58; the paper's rates are unknown")),
        Rate(1.2e-4, _BY_ROWS.format("1 against 0.58")),
        Rate(6e-5, _BY_ROWS.format("1 against 0.58")),
    ),
    "eva": (
        Rate(6e-4, _BY_ROWS.format("1 against 0.58")),
        Rate(1.2e-4, "the authors' 5e-4 at alpha 1, r 16: at alpha = r that is 3e-5 for B and 5e-4 for A"),
        Rate(6e-5, _IN_KAIMINGS_RATIO),
    ),
    "corda": (
        Rate(2e-4, _AS_PISSA),
        Rate(2e-5, "the authors' script for Llama-2-7B: alpha = r, batch 128"),
        Rate(1e-5, _IN_KAIMINGS_RATIO),
    ),
    "loftq": (
        Rate(8e-4, "ours: 7B's share of `kaiming`'s"),
        Rate(1.5e-4, "the authors' 3e-4 at r 64, alpha 16 (batch 16): at alpha = r that is half of it"),
        Rate(8e-5, _IN_KAIMINGS_RATIO),
    ),
}
BASELINE = "kaiming"


class MissingRates(LookupError):
    """`RATES` has no row for an initialization."""


def find_rates(method: InitConfig) -> Row:
    """The row of `RATES` that this initialization takes its default rates from.

    Raises:
        MissingRates: there is none.
    """
    if method.rates not in RATES:
        raise MissingRates(
            f"{method.method} has no default learning rates: add the line"
            f' "{method.rates}": (Rate(...), Rate(...), Rate(...)), to RATES in lorainit/config/rates.py,'
            " with a rate for each of SIZES and its source (docs/add-a-method.md)."
        )
    return RATES[method.rates]


def default_rate(method: InitConfig, *, weights: int) -> float:
    """The default rate for a base model.

    Between two columns the logarithm of the rate is interpolated over the logarithm of the size. Outside of them the
    nearest column is used, because nothing is known about such sizes.

    Args:
        weights: how many numbers the base's linear layers hold.

    Raises:
        MissingRates: as `find_rates`.
    """
    return _at(find_rates(method), weights)


def share_of_baseline(method: InitConfig, *, weights: int) -> float:
    """The factor from a rate that was measured with `kaiming` to the rate of another initialization."""
    return default_rate(method, weights=weights) / _at(RATES[BASELINE], weights)


def _at(row: Row, weights: int) -> float:
    """The rate at one size, rounded to two digits because a default is no more exact than that."""
    sizes = list(SIZES.values())
    if weights <= sizes[0]:
        return row[0].value
    for left, right, smaller, larger in zip(sizes, sizes[1:], row, row[1:], strict=False):
        if weights <= right:
            way = math.log(weights / left) / math.log(right / left)
            return float(f"{smaller.value * (larger.value / smaller.value) ** way:.1e}")
    return row[-1].value
