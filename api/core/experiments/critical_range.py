"""How far apart the best cells of equally good treatments lie by chance: the distance that counts as a difference.

Each treatment stands in the table with the best of its learning rates, and so looks better than it is.
With one rate the distance is Tukey's studentized range (1949). With several, the treatments' values are minima of
normal variables, and the distance is the 95 % quantile of the range of such minima, in standard errors of a mean.

How many of a treatment's rates are about equally good is unknown, and the distance depends on it: it is largest when
some treatments have several good rates and the others one. So it is computed for every number of treatments that have
all their rates good while the others have one, and the largest is taken. `tests/api/core/experiments/test_ranking.py`
tries other patterns.
"""

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

CONFIDENCE = 0.95
POINTS, SPREADS = 300, 150  # of the integrals over a mean and over the estimated noise; more change the third digit


@lru_cache(maxsize=1024)
def find_critical_range(treatments: int, rates: int, degrees: int) -> float:
    """The range that equally good treatments exceed in 5 % of experiments, in standard errors of a mean.

    Args:
        treatments: how many are compared, at least 2.
        rates: from how many learning rates the best one of each was chosen.
        degrees: the degrees of freedom of the estimate of the noise, at least 1.
    """
    from scipy.stats import studentized_range  # here, because importing it takes a second

    tukey = float(studentized_range.ppf(CONFIDENCE, treatments, degrees))
    if rates == 1:
        return tukey
    highest = float(studentized_range.ppf(CONFIDENCE, treatments * rates, degrees))
    return max(_find_quantile(treatments, flexible, rates, degrees, highest) for flexible in range(1, treatments))


def _find_quantile(treatments: int, flexible: int, rates: int, degrees: int, highest: float) -> float:
    """The quantile if `flexible` treatments have all their rates equally good and the others one good rate each.

    It is below `highest`, the range over all cells.
    """
    from scipy.optimize import brentq

    spreads = _find_spreads(degrees)

    def miss(distance: float) -> float:
        return _find_share(treatments, flexible, rates, distance * spreads) - CONFIDENCE

    return float(brentq(miss, 0.1, highest, xtol=1e-2))


@lru_cache(maxsize=64)
def _find_spreads(degrees: int) -> "Array":
    """Equally likely values of estimated noise divided by true noise."""
    import numpy as np
    from scipy.stats import chi2

    spreads: Array = np.sqrt(chi2.ppf((np.arange(SPREADS) + 0.5) / SPREADS, degrees) / degrees)
    return spreads


def _find_share(treatments: int, flexible: int, rates: int, distances: "Array") -> float:
    """The mean probability that the treatments lie within these distances, in standard errors.

    The lowest one lies at y, and all others between y and y + distance (the usual integral for a range).
    """
    import numpy as np
    from scipy.stats import norm

    y = np.linspace(-9.0, 9.0, POINTS)[None, :]
    below, beyond = norm.sf(y), norm.sf(y + distances[:, None])
    density = norm.pdf(y)
    # The best of m equal rates lies above y if all m do.
    several, one = below**rates - beyond**rates, below - beyond
    fixed = treatments - flexible
    lowest = flexible * rates * density * below ** (rates - 1) * several ** (flexible - 1) * one**fixed
    lowest = lowest + fixed * density * several**flexible * one ** (fixed - 1)
    return float(np.trapezoid(lowest, y, axis=1).mean())
