"""`lorainit compare`: initializations compared on your own rows, with the table in the terminal while it fills."""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from openai import APIConnectionError, InternalServerError, OpenAI
from rich.console import Group
from rich.live import Live
from rich.text import Text
from typer import Argument, Option

from api.cli import client as remote
from api.cli import tables
from api.cli.client import Problem
from api.cli.console import err, out
from api.cli.watch import Reconnect

POLL_SECONDS = 2.0
VALIDATION_SHARE = 10  # one of so many rows is kept for validation if the caller gives no file for it
MOST_VALIDATION_ROWS = 1000  # because every evaluation reads all of them
COLUMNS = ("init", "rate", "loss", "±", "behind", "95 %", "steps to baseline", "init s", "train s", "download")

app = typer.Typer()


@app.command(rich_help_panel="Experiments")
def compare(
    train: Annotated[Path, Argument(help="Training rows: OpenAI chat or prompt/completion JSONL.")],
    model: Annotated[str, Option("--model", "-m", help="Base model.")],
    init: Annotated[
        list[str], Option(help="Methods, separated by commas; or one as JSON. May be given several times.")
    ],
    rates: Annotated[
        str, Option(help="Learning rates, separated by commas, or auto: three around each method's own.")
    ] = "auto",
    seeds: Annotated[int, Option(min=1, max=32, help="How many seeds; fewer than 3 tell little.")] = 3,
    validation: Annotated[
        Path | None, Option(help="Validation rows; default: every tenth training row is kept for it.")
    ] = None,
    r: Annotated[str, Option("--r", help="Rank, or several separated by commas.")] = "16",
    epochs: Annotated[int | None, Option(help="Epochs: how often each training row is used.")] = None,
    steps: Annotated[int | None, Option(help="Optimizer steps; overrides --epochs.")] = None,
    batch: Annotated[int | None, Option(help="Effective batch size in rows.")] = None,
    every: Annotated[int | None, Option(help="Steps between two evaluations; default: once per epoch.")] = None,
    parallel: Annotated[int | None, Option(help="The most jobs that run at once.")] = None,
    halving: Annotated[
        bool, Option("--halving", help="Stop what is far behind early, for a quarter of the cost.")
    ] = False,
    extend: Annotated[
        bool, Option("--extend", help="Add rates where a best one lies at the edge of the grid.")
    ] = False,
    confirm: Annotated[int, Option(min=0, max=32, help="Run the leaders again on so many fresh seeds.")] = 0,
    most: Annotated[int | None, Option(min=1, max=256, help="The most jobs, those of --extend included.")] = None,
    name: Annotated[str | None, Option(help="Name of the experiment; default: the file's.")] = None,
    report: Annotated[Path | None, Option(help="Where to write the HTML report; default: EXPERIMENT.html.")] = None,
    detach: Annotated[bool, Option("--detach", help="Print the experiment's id and do not wait.")] = False,
) -> None:
    """Compare initializations on your rows: ranked, with intervals, costs and plain words."""
    ranks = [_number(part, int, "--r") for part in r.split(",")]
    client = remote.connect()
    with _validation_rows(train, validation) as (rows, held_out):
        training_file, validation_file = remote.upload(client, rows), remote.upload(client, held_out)
    hyperparameters = {"n_epochs": epochs, "max_steps": steps, "batch_size": batch, "eval_interval": every}
    given = {key: value for key, value in hyperparameters.items() if value is not None}
    body = {
        "name": name or train.name[:128],
        "job": {
            "model": model,
            "training_file": training_file,
            "validation_file": validation_file,
            "method": {"type": "supervised", "supervised": {"hyperparameters": given}},
            "lora": {"r": ranks[0]},
        },
        "grid": {
            "init": [remote.parse_init(one) for one in _split_inits(init)],
            "learning_rates": "auto"
            if rates == "auto"
            else [_number(one, float, "--rates") for one in rates.split(",")],
            "seeds": list(range(1, seeds + 1)),
            **({"ranks": ranks} if len(ranks) > 1 else {}),
        },
        "schedule": "halving" if halving else "full",
        "extend": extend,
        "confirm_seeds": confirm,
        **{key: value for key, value in {"max_parallel": parallel, "max_jobs": most}.items() if value is not None},
    }
    made: Any = client.post("/experiments", body=body, cast_to=object)
    err.print(made["plan"], style="dim")
    out.print(made["id"])
    if not detach:
        _follow(client, made["id"], report)


@app.command(rich_help_panel="Experiments")
def experiment(
    experiment_id: Annotated[str, Argument(help="Experiment id.")],
    report: Annotated[Path | None, Option(help="Where to write the HTML report; default: EXPERIMENT.html.")] = None,
) -> None:
    """Follow an experiment to its end, print its table and write its report."""
    _follow(remote.connect(), experiment_id, report)


def _follow(client: OpenAI, experiment_id: str, report: Path | None) -> None:
    try:
        shown = _watch(client, experiment_id)
    except KeyboardInterrupt:
        err.print(f"The experiment goes on. Again: lorainit experiment {experiment_id}")
        raise typer.Exit(130) from None
    for line in (shown["card"] or {}).get("warnings", []):
        err.print(f"warning: {line}", style="yellow")
    for sentence in shown["summary"]:
        out.print(sentence)
    path = report or Path(f"{experiment_id}.html")
    page: Any = client.get(f"/experiments/{experiment_id}/report", cast_to=str)
    path.write_text(page, encoding="utf-8")
    err.print(f"report: {path}")
    if shown["status"] != "succeeded":
        raise Problem(f"experiment {experiment_id} {shown['status']}; `lorainit list` shows its jobs")


def _watch(client: OpenAI, experiment_id: str) -> dict[str, Any]:
    """Show the table while it fills; the experiment when it has ended. A server that answered before is waited for.

    Raises:
        OpenAIError: the server never answered, or not for two minutes.
    """
    with Live(console=err, auto_refresh=False, transient=True) as live:
        reconnect, shown = Reconnect(live.console), dict[str, Any]()
        while shown.get("status") not in remote.FINAL:
            try:
                shown = _retrieve(client, experiment_id)
            except (APIConnectionError, InternalServerError) as error:
                reconnect.note_error(error)
                time.sleep(POLL_SECONDS)
                continue
            reconnect.note_answer()
            live.update(Group(_describe_counts(shown), _draw(shown)), refresh=True)
            if shown["status"] not in remote.FINAL:
                time.sleep(POLL_SECONDS)
    out.print(_draw(shown), soft_wrap=False)
    return shown


def _retrieve(client: OpenAI, experiment_id: str) -> dict[str, Any]:
    found: Any = client.get(f"/experiments/{experiment_id}", cast_to=object)
    return dict(found)


def _describe_counts(shown: Mapping[str, Any]) -> Text:
    counts = shown["job_counts"]
    parts = [f"{counts[name]} {name}" for name in ("running", "queued", "failed", "cancelled") if counts[name]]
    return Text(f"{counts['succeeded']} of {counts['total']} jobs have succeeded; " + ", ".join(parts), style="dim")


def _draw(shown: Mapping[str, Any]) -> Any:
    return tables.make_table(COLUMNS, [_cells(row) for row in shown["results"]])


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    objective, difference, cost = row["objective"], row["difference_to_best"], row["cost"]
    interval = (difference or {}).get("family_ci95")
    tied = " tied" if row["tied_with_best"] and row["rank"] > 1 else ""
    share, size = row["to_baseline_loss"]["steps"], row["adapter_bytes"]
    return (
        row["name"],
        ""
        if row["learning_rate"] is None
        else f"{row['learning_rate']:g}" + ("!" if row["learning_rate_at_edge"] else ""),
        "" if objective is None else f"{objective['mean']:.4f}",
        "" if objective is None or objective["std"] is None else f"{objective['std']:.4f}",
        "" if difference is None else f"{difference['mean']:.4f}{tied}",
        "" if interval is None else f"{interval[0]:.4f}..{interval[1]:.4f}",
        "" if share is None else f"{share:.0%}",
        "" if cost["init_seconds"] is None else f"{cost['init_seconds']:.1f}",
        "" if cost["train_seconds"] is None else f"{cost['train_seconds']:.1f}",
        "" if size is None else f"{size / 1e6:.1f} MB, r {row['export_rank']}",
    )


def _split_inits(given: Sequence[str]) -> list[str]:
    """The methods of all options; one that begins like JSON is taken whole."""
    parts = [[text] if text.lstrip().startswith("{") else text.split(",") for text in given]
    return [part.strip() for group in parts for part in group if part.strip()]


def _number(text: str, kind: type[int] | type[float], option: str) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise Problem(f"{option} must be numbers, separated by commas (got {text!r}).") from error


@contextmanager
def _validation_rows(train: Path, validation: Path | None) -> Iterator[tuple[Path, Path]]:
    """The files of training and validation rows; without a file for validation, a part of the training rows."""
    if validation is not None:
        yield train, validation
        return
    if not train.is_file():
        raise Problem(f"{train} is not a file.")
    with tempfile.TemporaryDirectory() as name:
        rows, held_out = Path(name) / train.name, Path(name) / f"validation-{train.name}"
        kept = _split_rows(train, rows, held_out)
        if not kept:
            raise Problem(f"{train} has too few rows to keep some for validation: give --validation.")
        err.print(f"{kept} rows of {train} are kept for validation (every tenth).", style="dim")
        yield rows, held_out


def _split_rows(source: Path, train: Path, held_out: Path) -> int:
    """Write every tenth row to `held_out` and the others to `train`; how many were held out."""
    number = kept = 0
    with source.open("rb") as lines, train.open("wb") as rows, held_out.open("wb") as others:
        for line in lines:
            if not line.strip():
                continue
            number += 1
            if number % VALIDATION_SHARE == 0 and kept < MOST_VALIDATION_ROWS:
                kept += 1
                others.write(line)
            else:
                rows.write(line if line.endswith(b"\n") else line + b"\n")
    return kept
