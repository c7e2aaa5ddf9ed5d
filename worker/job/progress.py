"""Turns the child's events into rows: progress, metrics, events, reports. Every write is fenced."""

import time
from collections import deque
from typing import Any

from sqlalchemy.orm import Session

from api.core.db.database import now, session_scope
from api.core.fields import translate_event_data
from api.core.jobs import estimates, events, jobs, metrics
from api.core.jobs.jobs import Lease
from api.core.monitoring import counters
from lorainit.config.events import Event, InitReport, Message, Metrics, Plan, Stage, Tick
from worker.job.stopwatch import STARTING, Stopwatch

# The percent at which each stage begins and ends, so that progress never falls and is 100 only at the end.
BANDS = {
    "loading": (0.0, 3.0),
    "initializing": (3.0, 8.0),
    "training": (8.0, 92.0),
    "evaluating": (8.0, 92.0),
    "exporting": (92.0, 95.0),
    "verifying": (95.0, 99.0),
}
FLUSH_SECONDS = 0.5  # between two writes, because a transaction for each step would be too many
FLUSH_EVENTS = 1000  # events of one write, because a run may make thousands a second and a long write delays others
EVENT_POINTS = 200  # metrics events of a job, because a list of thousands helps nobody; all steps are in the CSV
PACE_STEPS = 10  # steps over which the speed is averaged, because single steps vary


class LeaseLost(Exception):
    """The job is not ours any more; nothing was written."""


class EventRecorder:
    """Collects a run's events and writes them in short fenced transactions."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._pending: list[Event] = []
        self._lines: list[events.EventDraft] = []  # those that become events of the job
        self._in_doubt = False  # the last flush failed, but may have been committed
        self._flushed = self._started = time.monotonic()
        self._percent = 0.0
        self._urgent = False
        self._stopwatch = Stopwatch()
        self._pace: deque[tuple[int, float]] = deque(maxlen=PACE_STEPS)
        self._expected: float | None = None  # seconds of the whole run, estimated from a similar one
        self.progress: dict[str, Any] = {
            "stage": "loading",
            "percent": 0.0,
            "step": 0,
            "total_steps": None,
            "epoch": 0.0,
            "tokens_seen": 0,
            "tokens_per_second": None,
            "train_loss": None,
            "elapsed_seconds": 0,
            "remaining_seconds": None,
            "stage_seconds": {STARTING: 0.0},
            "seconds_to_first_step": None,
            "updated_at": None,
        }

    def add(self, event: Event) -> None:
        """Remember one event; `flush` writes it."""
        self._stopwatch.add(event)
        self._advance(event)
        self._urgent |= isinstance(event, Stage | Plan | InitReport)
        if not isinstance(event, Tick):
            self._pending.append(event)
        line = _make_event_draft(event)
        if line is not None:
            self._lines.append(line)

    @property
    def is_due(self) -> bool:
        """Whether to write now: after an important event, after many events, or after a while."""
        enough = self._urgent or len(self._pending) >= FLUSH_EVENTS
        return enough or time.monotonic() - self._flushed >= FLUSH_SECONDS

    def flush(self) -> None:
        """Write what is pending in one transaction. After an error it can be called again, and writes everything once.

        Raises:
            LeaseLost: the job is not ours any more.
        """
        pending = list(self._pending)
        with session_scope() as session:
            at = now(session)
            self.progress["updated_at"] = int(at.timestamp())
            self.progress["elapsed_seconds"] = round(time.monotonic() - self._started)
            self.progress["stage_seconds"] = self._stopwatch.seconds
            self.progress["seconds_to_first_step"] = self._stopwatch.to_first_step
            # The fenced write comes first: if the job is not ours any more, nothing below is written either.
            if not jobs.update_run(session, self._lease, **self._make_columns(session, pending)):
                raise LeaseLost
            steps = [(event.step, _dump_numbers(event)) for event in pending if isinstance(event, Metrics)]
            metrics.save_steps(session, self._lease.job_id, self._lease.token, steps, at=at)
            lines = self._find_unwritten(session)
            events.append_all(session, self._lease.job_id, lines, at=at)
            retries = sum(line.data.get("kind") == "oom_retry" for line in lines)
            counters.add(session, "out_of_memory", retries, outcome="retried")
            self._in_doubt = True
            session.commit()
        self._pending, self._lines, self._in_doubt = [], [], False
        self._urgent, self._flushed = False, time.monotonic()

    def _find_unwritten(self, session: Session) -> list[events.EventDraft]:
        """The events to write. Some may be written already if the connection was lost during a commit."""
        known = events.find_written(session, self._lines) if self._in_doubt else ()
        return [line for line in self._lines if line.id not in known]

    def _make_columns(self, session: Session, pending: list[Event]) -> dict[str, Any]:
        """The values for the job's row."""
        columns: dict[str, Any] = {}
        for event in pending:
            if isinstance(event, Plan):
                columns["plan"] = plan = event.model_dump(mode="json", exclude={"kind", "member"})
                self._expected = estimates.estimate_seconds(session, self._lease.job_id, plan)
            elif isinstance(event, InitReport):
                columns["init_report"] = event.report
        if not self._pace:  # before the first step there is only the estimate
            self.progress["remaining_seconds"] = self._subtract_elapsed()
        return {**columns, "progress": dict(self.progress)}

    def _advance(self, event: Event) -> None:
        progress = self.progress
        if isinstance(event, Stage):
            progress["stage"] = event.stage
            self._reach(
                BANDS[event.stage][0] if event.stage in ("loading", "initializing", "exporting", "verifying") else 0
            )
        elif isinstance(event, Tick) and progress["stage"] in ("initializing", "verifying"):
            low, high = BANDS[progress["stage"]]
            self._reach(low + (high - low) * event.done / max(1, event.total))
        elif isinstance(event, Plan):
            progress["total_steps"] = event.total_steps
        elif isinstance(event, Metrics):
            low, high = BANDS["training"]
            share = event.step / max(1, event.total_steps)
            self._reach(low + (high - low) * share)
            remaining = self._estimate_remaining(event)
            progress.update(
                step=event.step,
                total_steps=event.total_steps,
                epoch=round(event.epoch, 4),
                tokens_seen=event.tokens,
                tokens_per_second=event.tokens_per_second or progress["tokens_per_second"],
                train_loss=event.train_loss if event.train_loss is not None else progress["train_loss"],
                remaining_seconds=None if remaining is None else round(remaining),
            )

    def _estimate_remaining(self, event: Metrics) -> float | None:
        """Seconds of training left at the speed of the last steps, even if these are the first, which are slow."""
        if event.step:
            self._pace.append((event.step, event.seconds))
        if not self._pace:
            return None
        (first, before), (last, after) = self._pace[0] if len(self._pace) > 1 else (0, 0.0), self._pace[-1]
        return (after - before) / max(1, last - first) * (event.total_steps - event.step)

    def _subtract_elapsed(self) -> int | None:
        """Seconds left of the estimate; None once the run has taken longer than that."""
        left = (self._expected or 0.0) - (time.monotonic() - self._started)
        return round(left) if left > 0 else None

    def _reach(self, percent: float) -> None:
        self._percent = max(self._percent, percent)
        self.progress["percent"] = round(self._percent, 1)


def _dump_numbers(event: Metrics) -> dict[str, Any]:
    return event.model_dump(mode="json", exclude={"kind", "member", "step"})


def _make_event_draft(event: Event) -> events.EventDraft | None:
    """The event of the job for an event of the child, if there is one."""
    if isinstance(event, Message):
        return events.EventDraft(event.message, level=event.level, data=translate_event_data(event.data))
    return _make_metrics_event(event) if isinstance(event, Metrics) and _is_worth_an_event(event) else None


def _is_worth_an_event(event: Metrics) -> bool:
    """About 200 training points per job, and every evaluation."""
    every = max(1, event.total_steps // EVENT_POINTS)
    return event.full_valid_loss is not None or event.step % every == 0 or event.step == event.total_steps


def _make_metrics_event(event: Metrics) -> events.EventDraft:
    data = event.model_dump(mode="json", exclude={"kind", "member", "seconds"}, exclude_none=True)
    parts = [f"Step {event.step}/{event.total_steps}:"]
    if event.train_loss is not None:
        parts.append(f"training loss={event.train_loss:.2f}")
    if event.full_valid_loss is not None:
        parts.append(f"validation loss={event.full_valid_loss:.2f}")
    return events.EventDraft(" ".join(parts), type="metrics", data=data)
