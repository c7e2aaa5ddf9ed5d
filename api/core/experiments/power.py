"""How large a difference has to be for an experiment to find it, before the experiment is run.

Differences are in units of the noise: the standard deviation of a result without its treatment's and its seed's part
(`api.core.experiments.ranking`). `benchmarks/experiment_power.py` compares these numbers with simulated experiments.
"""

import math
from functools import lru_cache

from api.core.experiments.critical_range import find_critical_range

POWER = 0.8  # the share of experiments in which a difference is to be found, as statisticians usually plan it
POINTS = 48  # of each integral; 200 change the fourth digit


def find_power(difference: float, *, treatments: int, rates: int, seeds: int) -> float:
    """The share of experiments that call a treatment better which is better by `difference`.

    It is the probability that the observed difference exceeds the half width of the family's interval. The sum of
    squares of the pair and that of all other contrasts are independent chi-squares, over which it is averaged, because
    the larger of two estimates of the noise is used.

    Args:
        treatments: how many are compared, at least 2.
        rates: at how many learning rates each is run.
        seeds: at least 2.
    """
    import numpy as np  # here, because importing them takes a second
    from scipy.stats import chi2, norm

    degrees = (treatments - 1) * (seeds - 1)
    middles = (np.arange(POINTS) + 0.5) / POINTS
    own = chi2.ppf(middles, seeds - 1)[:, None]
    rest = chi2.ppf(middles, degrees - (seeds - 1))[None, :] if treatments > 2 else np.zeros((1, 1))
    spread = np.sqrt(np.maximum(own / (seeds - 1), (own + rest) / degrees))
    half = find_critical_range(treatments, rates, degrees) * spread / math.sqrt(seeds)
    return float(norm.cdf((difference - half) / math.sqrt(2 / seeds)).mean())


@lru_cache(maxsize=1024)
def find_detectable(*, treatments: int, rates: int, seeds: int) -> float | None:
    """The difference that `POWER` of experiments find; None if nothing is ever found, as with one seed or treatment."""
    from scipy.optimize import brentq

    if treatments < 2 or seeds < 2:
        return None

    def miss(difference: float) -> float:
        return find_power(difference, treatments=treatments, rates=rates, seeds=seeds) - POWER

    highest = 1.0
    while miss(highest) < 0:
        highest *= 2
    return round(float(brentq(miss, 0.0, highest, xtol=1e-3)), 2)


def describe_plan(*, treatments: int, rates: int, seeds: int) -> str:
    """What the experiment will be able to tell, in a sentence."""
    found = find_detectable(treatments=treatments, rates=rates, seeds=seeds)
    if treatments < 2:
        return "One treatment is compared with nothing: give several initializations or ranks."
    if found is None:
        return "With one seed no difference can be told from noise: give at least 3 seeds."
    text = f"With {seeds} seeds, a difference of {found:.1f} times the noise is found in {POWER:.0%} of experiments"
    more = [number for number in (5, 10, 20) if number > seeds][:2]
    others = [
        f"{find_detectable(treatments=treatments, rates=rates, seeds=number):.1f} with {number}" for number in more
    ]
    return f"{text} ({', '.join(others)})." if others else f"{text}."
