"""Where a run's time goes: seconds per stage, and from the claim to the first step."""

import time
from collections.abc import Callable

from lorainit.config.events import Event, Metrics, Stage

STARTING = "starting"  # until the child's first event: downloading files, starting Python, loading torch


class Stopwatch:
    """Counts from the claim on. A stage that comes again (evaluating, training) is added up."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._claimed = self._entered = clock()
        self._stage = STARTING
        self._seconds: dict[str, float] = {}
        self.to_first_step: float | None = None

    def add(self, event: Event) -> None:
        """Look at one event when it arrives."""
        if isinstance(event, Stage):
            self._enter(event.stage)
        elif self._stage == STARTING:
            self._enter("loading")
        if isinstance(event, Metrics) and event.train_loss is not None and self.to_first_step is None:
            self.to_first_step = round(self._clock() - self._claimed, 3)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds in each stage so far, the present one included; together, the time since the claim."""
        present = self._seconds.get(self._stage, 0.0) + self._clock() - self._entered
        return {stage: round(seconds, 3) for stage, seconds in {**self._seconds, self._stage: present}.items()}

    def _enter(self, stage: str) -> None:
        at = self._clock()
        self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + at - self._entered
        self._stage, self._entered = stage, at
