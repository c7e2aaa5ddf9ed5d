"""What is tried for a job with `lora.init: "auto"`, how long, and who wins. No database here.

A probe runs a few candidates (an initialization at a learning rate) on the job's own rows for the first steps of its
own schedule, stops most of them early, and hands the best one's checkpoint to the job. What it assumes, and where the
numbers below come from: docs/decisions/0076.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from api.core.experiments.grid import name_inits
from api.core.experiments.halving import NEARLY, Standing

BUDGET = 0.25  # of the job's steps, spent on candidates that are not chosen
FEWEST, MOST = 3, 6  # candidates
SHORTEST = 8  # steps of a candidate; a loss after fewer says little
LONGEST_ASKED = 2000  # steps; a job for which so many are too few has a warm-up that no budget covers
SECOND = 3  # the second look is at most so many times as late as the first
LEFT = 2  # candidates that go on after the first look
# To choose from, the cheapest first, because of equally good ones the first is taken.
METHODS = ("kaiming", "loram", "lora_one", "eva")
FACTORS = (1.0, 3.0, 1 / 3)  # of a method's usual learning rate, in the order in which they are tried
# The first of these are tried, as many as the budget allows: (place in METHODS, factor).
_ORDER = ((0, 1.0), (1, 1.0), (0, 3.0), (2, 1.0), (1, 3.0), (3, 1.0))


@dataclass(frozen=True)
class Candidate:
    """An initialization, by its place in the list of methods, and the factor of its usual rate."""

    method: int
    factor: float


@dataclass(frozen=True)
class ProbePlan:
    """How many candidates are tried, and after which steps they are compared."""

    candidates: int
    looks: tuple[int, int]

    @property
    def cost(self) -> int:
        """Optimizer steps of the candidates that are not chosen."""
        first, second = self.looks
        return self.candidates * first + (LEFT - 1) * (second - first) - first


def list_candidates(methods: int, *, own: bool, fixed_rate: bool) -> list[Candidate]:
    """What may be tried, the most promising first.

    Args:
        methods: how many initializations there are to choose from.
        own: whether they are our list (`METHODS`) and not the caller's.
        fixed_rate: whether the caller has set the learning rate.
    """
    if fixed_rate:
        return [Candidate(method, 1.0) for method in range(methods)]
    if own and methods == len(METHODS):
        return [Candidate(method, factor) for method, factor in _ORDER]
    return [Candidate(method, factor) for factor, method in product(FACTORS, range(methods))]


def plan(steps: int, *, warmup: int, budget: int, available: int) -> ProbePlan | None:
    """The probe of a job; None if its budget does not allow at least `FEWEST` candidates.

    The first look is behind the warm-up, in which no candidate has reached its own rate yet.

    Args:
        steps: of the whole job.
        warmup: steps of these in which the rate still rises.
        budget: optimizer steps that may be spent on candidates that are not chosen.
        available: how many candidates there are.
    """
    first = max(SHORTEST, warmup + max(4, math.ceil(0.01 * steps)))
    number = min(MOST, available, budget // first)
    if number < min(FEWEST, available) or number < LEFT:
        return None
    left = budget - (number - LEFT) * first  # the chosen one's steps are not lost, so they cost nothing
    second = min(left, SECOND * first, steps - 1)
    return ProbePlan(number, (first, second)) if second > first else None


def find_least_steps(*, warmup_ratio: float) -> int | None:
    """Of how many steps a job must be for its own budget to allow a probe; None if its warm-up is too long for any."""

    def allows(steps: int) -> bool:
        warmup, budget = math.ceil(warmup_ratio * steps), int(BUDGET * steps)
        return plan(steps, warmup=warmup, budget=budget, available=MOST) is not None

    return next(filter(allows, range(SHORTEST, LONGEST_ASKED)), None)


def sort_candidates(standings: Sequence[Standing]) -> list[Standing]:
    """The best first. Those that are better by no more than noise are sorted by cost.

    `Standing.treatment` is (place of the method in its list, rank), and the cheapest methods come first in that list.
    Of two rates of one method the higher one is taken where the losses are nearly the same (`halving`).
    """
    known = [one for one in standings if math.isfinite(one.mean)]
    best = min((one.mean for one in known), default=math.inf)
    tied = [one for one in known if one.mean - best <= NEARLY]
    others = [one for one in known if one.mean - best > NEARLY]
    return sorted(tied, key=_by_cost) + sorted(others, key=lambda one: one.mean)


def _by_cost(one: Standing) -> tuple[int, float]:
    assert isinstance(one.treatment, tuple)
    return one.treatment[0], -one.learning_rate


# --- what was found ------------------------------------------------------------------------------------------


def describe_candidates(request: Mapping[str, Any], decisions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each candidate of an experiment with its last loss and the step at which it had it, the best first."""
    names = name_inits(request["grid"]["init"])
    last: dict[tuple[int, float], dict[str, Any]] = {}
    for decision in decisions:
        for one in decision["cells"]:
            place, rate = one["treatment"][0], one["learning_rate"]
            last[place, rate] = {
                "init": names[place],
                "learning_rate": rate,
                "valid_loss": one["mean"],
                "steps": decision["step"],
                "kept": one["kept"],
            }
    return sorted(last.values(), key=_by_place)


def _by_place(one: Mapping[str, Any]) -> tuple[int, bool, float]:
    return -one["steps"], not one["kept"], math.inf if one["valid_loss"] is None else one["valid_loss"]


def list_losses(found: Sequence[Mapping[str, Any]]) -> str:
    """The same as one sentence."""
    return "; ".join(
        f"{one['init']} at {one['learning_rate']:g}: "
        + ("no loss" if one["valid_loss"] is None else f"validation loss {one['valid_loss']:.4f}")
        + f" after {one['steps']} steps"
        for one in found
    )
