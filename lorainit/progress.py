"""The progress bar of the command line. It draws the events of a run on stderr."""

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from lorainit.config.events import Done, Event, InitReport, Message, Metrics, Plan, Stage, Tick


class ProgressDisplay:
    """A context manager that draws on stderr. `conclude` prints where the adapter is."""

    def __init__(self, console: Console | None = None) -> None:
        # No markup and no emoji, because messages contain names and paths: rich would read "[x]" or ":rocket:" in them.
        self.console = console or Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)
        texts = ("{task.description:<14}", "{task.fields[note]}")
        stage, note = (TextColumn(text, markup=False) for text in texts)
        columns = (stage, BarColumn(), note)
        self.progress = Progress(*columns, TimeElapsedColumn(), console=self.console)
        self.task: TaskID | None = None
        self.done: list[Done] = []

    def __enter__(self) -> "ProgressDisplay":
        self.progress.start()
        return self

    def __exit__(self, *reason: object) -> None:
        if self.task is not None:
            self.progress.stop_task(self.task)
        self.progress.stop()

    def show(self, event: Event) -> None:
        """Draw one event."""
        match event:
            case Stage(stage=stage):
                self._enter(stage)
            case Tick(done=done, total=total) if self.task is not None:
                self.progress.update(self.task, completed=done, total=total)
            case Metrics() if self.task is not None:
                self.progress.update(self.task, note=_numbers(event))
            case Message(level=level, message=text) if level != "info":
                self.console.print(Text.assemble((level, "yellow"), f": {text}"))
            case Plan():
                self.console.print(_sentence(event))
            case InitReport(report=report):
                self.console.print(
                    f"Initialized {report['modules']} modules with {report['method']} in {report['seconds']:.1f} s;"
                    f" loss {report['base_loss']:.4f} -> {report['initial_loss']:.4f}"
                )
            case Done():
                self.done.append(event)
            case _:
                pass

    def conclude(self) -> None:
        """Print the result of each run that succeeded: the export check, the adapter's folder, and its warnings."""
        for done in self.done:
            check = done.export_check
            self.console.print(
                f"Checked with PEFT {check['loaders'][0]['version']} on the untouched base:"
                f" logits differ by {check['max_abs_logit_difference']:.1e} at most."
            )
            self.console.print(f"Adapter: {done.adapter}")
            for found in done.warnings:
                self.console.print(Text.assemble((found.code, "yellow"), f": {found.message}"))

    def _enter(self, stage: str) -> None:
        # Training and evaluation take turns, so a stage that comes again continues its bar and draws no new one.
        if self.task is not None:
            self.progress.stop_task(self.task)
        known = next((t for t in self.progress.tasks if t.description == stage), None)
        self.task = known.id if known else self.progress.add_task(stage, total=None, note="")


def _numbers(event: Metrics) -> str:
    parts = [f"step {event.step}/{event.total_steps}"]
    if event.train_loss is not None:
        parts.append(f"loss {event.train_loss:.4f}")
    if event.full_valid_loss is not None:
        parts.append(f"valid {event.full_valid_loss:.4f}")
    if event.tokens_per_second is not None:
        parts.append(f"{event.tokens_per_second:.0f} tok/s")
    return "  ".join(parts)


def _sentence(plan: Plan) -> str:
    about = "about " if plan.trainable_parameters_estimated else ""
    return (
        f"{plan.rows} rows, {plan.total_steps} steps, {plan.modules} modules"
        f" ({', '.join(plan.target_modules)}), {about}{plan.trainable_parameters / 1e6:.2f} M parameters,"
        f" {plan.precision} on {plan.device}"
    )
