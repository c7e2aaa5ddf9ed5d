"""A job's progress in a terminal: a live bar and its events; plain lines when nobody looks."""

import time
from typing import Any

from openai import APIConnectionError, InternalServerError, OpenAI
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from api.terminal.client import FINAL, events_after, field_of, sequence

POLL_SECONDS = 0.5
PATIENCE_SECONDS = 120.0
STYLE = {"info": "", "warn": "yellow", "error": "red"}


def watch(client: OpenAI, job_id: str, console: Console) -> FineTuningJob:
    """Follow a job to its end; a server that is away for a moment is waited for."""
    seen, away_since = 0, None
    with _bar(console) as bar:
        task = bar.add_task("", total=100.0, numbers="", eta="")
        while True:
            try:
                job = client.fine_tuning.jobs.retrieve(job_id)
                events = events_after(client, job_id, seen)
            except (APIConnectionError, InternalServerError):
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > PATIENCE_SECONDS:
                    raise
                bar.update(task, description="server away")
                time.sleep(POLL_SECONDS)
                continue
            away_since = None
            for event in events:
                seen = sequence(event)
                _tell(bar.console, event)
            _draw(bar, task, job, events)
            if job.status in FINAL:
                return job
            time.sleep(POLL_SECONDS)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description:<12}"),
        BarColumn(bar_width=28),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[numbers]}"),
        TextColumn("[dim]{task.fields[eta]}"),
        console=console,
        disable=not console.is_terminal,
    )


def _draw(bar: Progress, task: TaskID, job: FineTuningJob, events: list[FineTuningJobEvent]) -> None:
    progress = field_of(job, "progress") or {}
    running = job.status == "running"
    stage = progress.get("stage") if running else job.status
    bar.update(task, description=stage or job.status, completed=progress.get("percent") or 0.0)
    losses = [loss for event in events if (loss := _data(event).get("train_loss")) is not None]
    parts = []
    if progress.get("total_steps"):
        parts.append(f"step {progress.get('step') or 0}/{progress['total_steps']}")
    if losses:
        bar.tasks[task].fields["loss"] = losses[-1]
    if (loss := bar.tasks[task].fields.get("loss")) is not None:
        parts.append(f"loss {loss:.3f}")
    if running and progress.get("tokens_per_second"):
        parts.append(f"{progress['tokens_per_second']:.0f} tokens/s")
    left = progress.get("remaining_seconds") if running else None
    bar.update(task, numbers="  ".join(parts), eta="" if left is None else f"{_clock(left)} left")


def _tell(console: Console, event: FineTuningJobEvent) -> None:
    data = _data(event)
    if event.type == "metrics" and data.get("full_valid_loss") is None and console.is_terminal:
        return  # the bar shows it
    clock = time.strftime("%H:%M:%S", time.localtime(event.created_at))
    console.print(Text(f"{clock}  {event.message}", style=STYLE.get(event.level, "")), soft_wrap=True)


def _data(event: FineTuningJobEvent) -> dict[str, Any]:
    return event.data if isinstance(event.data, dict) else {}


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
