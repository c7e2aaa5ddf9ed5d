"""A job's progress in a terminal: a live bar and its events, or plain lines if the output is not a terminal."""

import time
from typing import Any

from openai import APIConnectionError, InternalServerError, OpenAI, OpenAIError
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from api.cli.client import FINAL, explain, find_events_after, get_field, retrieve, sequence

POLL_SECONDS = 0.5
RECONNECT_SECONDS = 120.0  # because a restart or an upgrade of a server takes up to a minute or two
STYLE = {"info": "", "warn": "yellow", "error": "red"}
WAITING = {
    "no_worker_for_device": "no worker that is up takes jobs for the device {device!r} (LORAINIT_WORKER_QUEUES of a"
    " worker names those it takes)",
    "restarting": "it starts again after a lost run",
    "project_limit_reached": "its project runs as many jobs as it may",
    "waiting_for_gpu": "it is the next to start when a worker is free",
    "waiting_for_turn": "it is {place} in the queue",
}
PLACES_COUNTED = 100  # the server counts no further: all jobs behind these get the next number


def watch(client: OpenAI, job_id: str, console: Console) -> FineTuningJob:
    """Follow a job to its end. A server that answered before is waited for if it stops answering."""
    seen = 0
    with _bar(console) as bar:
        task = bar.add_task("", total=100.0, numbers="", eta="")
        reconnect, wait = Reconnect(bar.console), _Wait(bar.console)
        while True:
            try:
                job = retrieve(client, job_id)
                events = find_events_after(client, job_id, seen)
            except (APIConnectionError, InternalServerError) as error:
                reconnect.note_error(error)
                bar.update(task, description="server away")
                time.sleep(POLL_SECONDS)
                continue
            reconnect.note_answer()
            for event in events:
                seen = sequence(event)
                _print_event(bar.console, event)
            wait.update(job)
            _draw(bar, task, job, events)
            if job.status in FINAL:
                return job
            time.sleep(POLL_SECONDS)


class Reconnect:
    """Decides how long to wait for a server that stopped answering, and prints that it waits."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._known = False
        self._since: float | None = None

    def note_error(self, error: OpenAIError) -> None:
        """Note that the server did not answer. Raises `error` if it never did, or not for `RECONNECT_SECONDS`."""
        clock = time.monotonic()
        if not self._known or (self._since is not None and clock - self._since > RECONNECT_SECONDS):
            raise error
        if self._since is None:
            self._since = clock
            text = f"The server is away ({explain(error)}); trying for {RECONNECT_SECONDS:.0f} s."
            self._console.print(text, style="yellow")

    def note_answer(self) -> None:
        """Note that the server answered."""
        if self._since is not None:
            self._console.print("The server is back.")
        self._known, self._since = True, None


class _Wait:
    """Prints why a job waits, once two polls in a row gave the same reason: most reasons last only a moment."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last, self._last_reported = "", ""

    def update(self, job: FineTuningJob) -> None:
        """Print the job's reason to wait if it is new and was the reason at the last poll, too."""
        reason = get_field(job, "queue_reason") or ""
        if reason and reason == self._last != self._last_reported:
            self._console.print(f"Waiting: {explain_wait(job)}.")
            self._last_reported = reason
        self._last = reason


def explain_wait(job: FineTuningJob) -> str:
    """A queued job's `queue_reason` as a sentence; "" if it has none."""
    reason = get_field(job, "queue_reason") or ""
    device = (get_field(job, "resources") or {}).get("device")
    position = get_field(job, "queue_position") or 0
    place = f"number {position}" if position <= PLACES_COUNTED else f"behind the first {PLACES_COUNTED}"
    return WAITING.get(reason, reason).format(device=device, place=place)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<12}", style="bold", markup=False),
        BarColumn(bar_width=28),
        TextColumn("{task.percentage:>3.0f}%", markup=False),
        TextColumn("{task.fields[numbers]}", markup=False),
        TextColumn("{task.fields[eta]}", style="dim", markup=False),
        console=console,
        disable=not console.is_terminal,
    )


def _draw(bar: Progress, task: TaskID, job: FineTuningJob, events: list[FineTuningJobEvent]) -> None:
    progress = get_field(job, "progress") or {}
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


def _print_event(console: Console, event: FineTuningJobEvent) -> None:
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
