"""Measures a start before its first step: the numbers from which `rate_prediction` tries to predict its rate."""

import time

from benchmarks.rate_first_update import measure_first_update, surroundings
from benchmarks.rate_records import RATES, Measures
from lorainit.context import Run
from lorainit.data.dataset import Sample


def first_rows(run: Run) -> list[Sample]:
    """The rows of the first step."""
    assert run.training.batch_size != "auto"
    return [run.data.samples[i] for i in run.order_rows(0)[: run.training.batch_size]]


def measure(run: Run, method: str, data: str) -> Measures:
    """Measure an initialized run on the rows of its first step."""
    started = time.monotonic()
    with surroundings(run, first_rows(run)) as around:
        found = measure_first_update(run, around)
        seconds = time.monotonic() - started
        line = [around.loss(-rate * found.direction) for rate in RATES]
    spread = found.eigenvalues
    return Measures(
        method=method,
        data=data,
        seed=run.spec.seed,
        slope=found.slope,
        curvature=found.curvature,
        size=found.size,
        gradient_norm=found.gradient_norm,
        largest=spread.largest,
        smallest=spread.smallest,
        residual=spread.residual,
        loss=found.loss,
        gradients=found.gradients,
        line=line,
        seconds=seconds,
    )
