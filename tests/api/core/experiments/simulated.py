"""Simulated experiments: results of which the truth is known."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from api.core.experiments.ranking import Ranking, Result, rank


@dataclass(frozen=True)
class Design:
    """A grid. A result is its cell's true mean, its seed's part (deviation 2), and noise (deviation 1)."""

    treatments: int
    rates: int
    seeds: int


def simulate(
    design: Design,
    *,
    mean: Callable[[int, int], float] = lambda treatment, rate: 0.0,
    noise: Sequence[float] = (),
    seed: int,
) -> list[Result]:
    """One experiment.

    Args:
        mean: the true mean of a treatment at a rate, both counted from 0; less is better.
        noise: the deviation of each treatment's noise, 1 if empty.
    """
    draw = random.Random(seed)
    blocks = [draw.gauss(0.0, 2.0) for _ in range(design.seeds)]
    return [
        Result(
            treatment,
            float(10**rate),
            block,
            mean(treatment, rate) + blocks[block] + draw.gauss(0.0, noise[treatment] if noise else 1.0),
        )
        for treatment in range(design.treatments)
        for rate in range(design.rates)
        for block in range(design.seeds)
    ]


def count_claims(
    design: Design, *, experiments: int, claim: Callable[[Ranking], bool], start: int = 0, **truth: object
) -> float:
    """The share of experiments in which `claim` is true of the ranking."""
    made = (rank(simulate(design, seed=start + number, **truth)) for number in range(experiments))  # type: ignore[arg-type]
    return sum(map(claim, made)) / experiments


def claims_any_difference(ranking: Ranking) -> bool:
    """Whether some treatment is called worse than the best one."""
    return any(not row.tied_with_best for row in ranking.rows)


def claims_better(better: int, worse: int) -> Callable[[Ranking], bool]:
    """Whether the first is ranked best and the second is called worse."""

    def claim(ranking: Ranking) -> bool:
        rows = {row.treatment: row for row in ranking.rows}
        return ranking.rows[0].treatment == better and not rows[worse].tied_with_best

    return claim
