"""The `lorainit` command: run the service, and use any server of this API from a terminal.

The service is imported inside the commands, so that `lorainit --help` does not load a database.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from openai import OpenAIError
from rich.text import Text
from typer import Argument, Option
from typer.core import TyperGroup

from api.cli import client as remote
from api.cli import compare, keys, tables
from api.cli.client import Problem
from api.cli.console import err, out
from api.cli.local import EXAMPLES, State, configure, explain
from lorainit.system import closed_pipe

WARNED = 3  # exit code for a job that succeeded with a warning, so that scripts can tell it from both other ends


class Commands(TyperGroup):
    """Commands whose expected errors are one readable line and exit code 1."""

    def main(self, *args: Any, standalone_mode: bool = True, **more: Any) -> Any:
        """Run the command line and end the process; with `standalone_mode=False` (tests) return instead."""
        more["standalone_mode"] = standalone_mode
        command = partial(super().main, *args, **more)
        if not standalone_mode:
            return command()
        sys.exit(closed_pipe.run(command))

    def invoke(self, ctx: Any) -> Any:
        """Run a command; show errors that the person can fix as one line."""
        try:
            return super().invoke(ctx)
        except Problem as error:
            self._refuse(str(error))
        except OpenAIError as error:
            self._refuse(remote.explain(error))
        except Exception as error:
            if (text := explain(error)) is None:
                raise
            self._refuse(text)

    @staticmethod
    def _refuse(text: str) -> None:
        err.print(Text.assemble(("error:", "red"), f" {text}"))
        raise typer.Exit(1)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="LoRA fine-tuning as a service, with the initialization as a typed choice. "
    "Client commands read OPENAI_BASE_URL and OPENAI_API_KEY.",
)
models_app = typer.Typer(no_args_is_help=True, help="What a server offers, and base models of your own.")
app.add_typer(keys.app, name="keys", rich_help_panel="Service")
app.add_typer(compare.app)
app.add_typer(models_app, name="models", rich_help_panel="Service")


# --- the service ---------------------------------------------------------------------------------


@app.command(rich_help_panel="Service")
def serve(
    state: State = None,
    host: Annotated[str | None, Option(help="Address to listen on (LORAINIT_HOST).")] = None,
    port: Annotated[int | None, Option(help="Port; 0 = any free one (LORAINIT_PORT).")] = None,
) -> None:
    """Run the whole service here: broker, worker, reconciler and API in one process tree."""
    configure(state=state, host=host, port=port)
    from api.embedded import service as embedded

    try:
        with embedded.run_service(report=lambda text: err.print(text, style="dim")) as (service, first_key):
            _announce(service.url, service.state, first_key)
            service.watch()
            err.print("stopping ...", style="dim")
    except embedded.CannotServe as error:
        raise Problem(str(error)) from error


@app.command(rich_help_panel="Service")
def demo(
    state: Annotated[Path, Option(help="Folder for this demo; emptied first if an earlier demo made it.")] = Path(
        ".state/demo"
    ),
) -> None:
    """Train, download and check an adapter through the whole service; exit 0 only if the loss fell and it reloads."""
    from api.cli import demo as demonstration

    raise typer.Exit(demonstration.run(state, out))


@app.command(rich_help_panel="Service")
def migrate(
    state: State = None,
    check: Annotated[bool, Option("--check", help="Compare migrations and tables on an empty database.")] = False,
    back_to: Annotated[
        str | None, Option(metavar="REVISION", help="Undo later migrations, before an older release is started.")
    ] = None,
) -> None:
    """Bring the database to the newest revision."""
    configure(state=state)
    from api.core.db import database as db
    from api.core.db import migrate
    from api.core.maintenance import startup
    from api.core.settings import get_settings

    if back_to is not None:
        migrate.downgrade(db.get_engine(), back_to)
        out.print(f"database at revision {back_to}: {db.get_engine().url!r}")
        return
    if not check:
        os.umask(startup.OTHERS)
        if get_settings().database_url is None:
            startup.make_private(get_settings().state_dir)
        migrate.upgrade(db.get_engine())
        out.print(f"database at the newest revision: {db.get_engine().url!r}")
        return
    engine = db.make_engine("sqlite://")
    migrate.upgrade(engine)
    if found := migrate.find_drift(engine):
        raise Problem("the migrations do not lead to the tables in code: " + "; ".join(str(item) for item in found))
    out.print("migrations and tables agree")


@models_app.command("list")
def list_models(
    search: Annotated[str, Argument(help="Only those with this in their name.")] = "",
    limit: Annotated[int, Option(min=1, help="How many.")] = 20,
) -> None:
    """What a server offers: bases, then adapters, newest first."""
    rows = [tables.make_model_row(model) for model in remote.list_models(remote.connect(), search=search, limit=limit)]
    out.print(tables.make_table(tables.MODEL_COLUMNS, rows), soft_wrap=False)


@models_app.command("inspect")
def models_inspect(
    source: Annotated[
        str, Argument(help="Folder, .gguf file, OWNER/NAME[@REVISION] of a model hub, or package:PACKAGE/FILE.")
    ],
    model_id: Annotated[str, Option("--id", help="Name by which requests call the model.")],
    root: Annotated[
        str | None, Option(help="Hub id of exactly these weights, by which adapters name their base.")
    ] = None,
) -> None:
    """Print the catalogue entry of a base model, for the file LORAINIT_CATALOGUE names (on the server's machine)."""
    from api.core.models.catalogue import ID
    from lorainit.config.model_facts import ModelFacts
    from lorainit.config.sources import LOCAL, is_root

    if re.fullmatch(ID, model_id) is None:
        raise Problem(f"--id must be letters, digits, '.', '_' and '-', at most 128 (got {model_id[:80]!r}).")
    if root is not None and not is_root(root):
        raise Problem(f"--root must be OWNER/NAME, or {LOCAL}NAME of a base that is on no hub (got {root[:80]!r}).")
    if find_spec("torch") is None:
        text = "a base model is inspected with torch, which is not installed here: run this where a worker runs."
        raise Problem(text)
    command = [sys.executable, "-m", "lorainit", "inspect", source, *([] if root is None else [f"--root={root}"])]
    answer = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if answer.returncode:
        raise Problem(f"{source or 'an empty source'} cannot be used as a base model; see above.")
    facts = ModelFacts.model_validate_json(answer.stdout)
    out.print(tables.format_catalogue_entry(facts, model_id=model_id, given=root is not None), end="")


@app.command(rich_help_panel="Service")
def doctor(state: State = None, as_json: Annotated[bool, Option("--json", help="For programs.")] = False) -> None:
    """Check database, broker, storage, clock, disks, devices; print what a run would use. Exit 1 if a check fails."""
    configure(state=state)
    from api.cli import doctor as examination

    if not examination.run(out, as_json=as_json):
        raise typer.Exit(1)


# --- at a server ---------------------------------------------------------------------------------


@app.command(rich_help_panel="Jobs")
def submit(
    train: Annotated[Path, Argument(help="Training rows: OpenAI chat or prompt/completion JSONL.")],
    model: Annotated[str, Option("--model", "-m", help="Base model.")],
    init: Annotated[str, Option(help='Method, or JSON such as \'{"method": "pissa", "niter": 4}\'.')] = "kaiming",
    r: Annotated[int, Option("--r", help="Rank.")] = 16,
    alpha: Annotated[float | None, Option(help="LoRA alpha; default: recommended for the method.")] = None,
    quantization: Annotated[str | None, Option(help="nf4 = train on the base model in four bits.")] = None,
    dora: Annotated[bool, Option("--dora", help="Train magnitudes too (DoRA).")] = False,
    validation: Annotated[Path | None, Option(help="Validation rows.")] = None,
    lr: Annotated[float | None, Option(help="Absolute peak learning rate.")] = None,
    epochs: Annotated[int | None, Option(help="Epochs: how often each training row is used.")] = None,
    steps: Annotated[int | None, Option(help="Optimizer steps; overrides --epochs.")] = None,
    batch: Annotated[int | None, Option(help="Effective batch size in rows.")] = None,
    append_eos: Annotated[
        bool,
        Option("--append-eos", help="Train the end token where an answer ends without a token that stops the model."),
    ] = False,
    precision: Annotated[str | None, Option(help="fp32, bf16 or auto: bf16 on a GPU that has it.")] = None,
    suffix: Annotated[str | None, Option(help="Part of the new model's name.")] = None,
    seed: Annotated[int | None, Option(help="Seed of everything random.")] = None,
    group: Annotated[bool, Option("--group", help="May be trained together with other such jobs.")] = False,
    device: Annotated[str, Option(help="any, cpu, gpu or the name of a queue that workers listen on.")] = "any",
    devices: Annotated[int, Option(help="Devices of one host that share each step's rows.")] = 1,
    follow: Annotated[bool, Option("--watch", help="Follow the job to its end.")] = False,
) -> None:
    """Upload rows and order a fine-tuning job. Prints the job's id."""
    lora = {"init": remote.parse_init(init), "r": r, "alpha": alpha, "use_dora": dora, "quantization": quantization}
    client = remote.connect()
    training_file = remote.upload(client, train)
    job = remote.submit(
        client,
        model=model,
        training_file=training_file,
        validation_file=None if validation is None else remote.upload(client, validation),
        hyperparameters={
            "learning_rate": lr,
            "n_epochs": epochs,
            "max_steps": steps,
            "batch_size": batch,
            "precision": precision,
        },
        lora=lora,
        resources={"group": group, "device": device, "devices": devices},
        append_eos=append_eos,
        suffix=suffix,
        seed=seed,
    )
    out.print(job.id)
    if follow:
        watch(job.id)


@app.command(rich_help_panel="Jobs")
def watch(job: Annotated[str, Argument(help="Job id.")]) -> None:
    """Follow a job to its end. Exit code 0: it succeeded; 3: it succeeded with a warning; 1: it did not."""
    from api.cli.watch import watch as follow

    try:
        ended = follow(remote.connect(), job, err)
    except KeyboardInterrupt:
        err.print(f"The job goes on. Again: lorainit watch {job}; stop it: lorainit cancel {job}")
        raise typer.Exit(130) from None
    if ended.status == "succeeded":
        err.print(Text.assemble(("succeeded", "green"), f": {ended.fine_tuned_model}. Get it: lorainit download {job}"))
        warnings = remote.get_field(ended, "warnings") or []
        for found in warnings:
            err.print(f"{found['code']}: {found['message']}", style="yellow")
        if warnings:
            raise typer.Exit(WARNED)
        return
    error = ended.error
    reason = f": {error.message} (code {error.code}{f', {error.param}' if error.param else ''})" if error else ""
    raise Problem(f"job {job} {ended.status}{reason}")


@app.command("list", rich_help_panel="Jobs")
def list_jobs(limit: Annotated[int, Option(min=1, help="How many.")] = 20) -> None:
    """The newest jobs."""
    rows = [tables.make_job_row(job) for job in remote.list_jobs(remote.connect(), limit)]
    out.print(tables.make_table(tables.JOB_COLUMNS, rows), soft_wrap=False)


@app.command(rich_help_panel="Jobs")
def cancel(job: Annotated[str, Argument(help="Job id.")]) -> None:
    """Cancel a job, at once and for good."""
    out.print(f"{job} {remote.connect().fine_tuning.jobs.cancel(job).status}")


@app.command(rich_help_panel="Jobs")
def pause(job: Annotated[str, Argument(help="Job id.")]) -> None:
    """Free the device; a run writes a checkpoint first and is `pausing` until then."""
    out.print(f"{job} {remote.connect().fine_tuning.jobs.pause(job).status}")


@app.command(rich_help_panel="Jobs")
def resume(job: Annotated[str, Argument(help="Job id.")]) -> None:
    """Let a paused or failed job go on from its last checkpoint."""
    out.print(f"{job} {remote.connect().fine_tuning.jobs.resume(job).status}")


@app.command(rich_help_panel="Jobs")
def download(
    job: Annotated[str, Argument(help="Job id.")],
    folder: Annotated[Path | None, Argument(help="Where to; default: a new folder named like the job.")] = None,
) -> None:
    """Fetch a job's adapter, check its SHA-256 and unpack it. Prints the folder."""
    out.print(str(remote.download(remote.connect(), job, folder or Path(job))))


@app.command(rich_help_panel="Jobs")
def methods() -> None:
    """The initializations: the server's if OPENAI_BASE_URL is set, else those of this installation."""
    if os.environ.get("OPENAI_BASE_URL"):
        answer: Any = remote.connect().get("/lora/methods", cast_to=object)
        rows = tables.list_offered_methods(answer["data"])
    else:
        err.print("OPENAI_BASE_URL is not set: these are the methods of this installation.", style="dim")
        rows = tables.list_installed_methods()
    out.print(tables.make_table(tables.METHOD_COLUMNS, rows), soft_wrap=False)


def _announce(url: str, state: Path, first_key: str | None) -> None:
    from api.core.models import catalogue

    base, command = f"{url}/v1", _own_name()
    out.print(Text.assemble("\n", ("Lorainit", "bold"), " is ready at ", (base, "bold")))
    out.print(f"State and logs: {state}. Ctrl+C stops everything.\n")
    another = f"{command} keys create --state {state}"
    if first_key is None:
        out.print(f"API keys exist already. Another one: {another}")
    else:
        out.print(Text.assemble("API key, shown only now: ", (first_key, "bold"), f"\nAnother one: {another}"))
    out.print("\nTry, in another terminal:", style="dim")
    out.print(f"  export OPENAI_BASE_URL={base} OPENAI_API_KEY={first_key or '...'}")
    out.print('  curl -H "Authorization: Bearer $OPENAI_API_KEY" $OPENAI_BASE_URL/models')
    model = next(iter(catalogue.get_entries()), None)
    if model is None:
        out.print(f"  {command} models inspect FOLDER --id NAME  # the catalogue offers no base model yet\n")
        return
    rows = EXAMPLES / "train.jsonl"
    rows = rows if rows.is_file() else Path("ROWS.jsonl")
    out.print(f"  {command} submit {shlex.quote(str(rows))} --model {model} --init loram --steps 20 --watch\n")


def _own_name() -> str:
    """How to call this command from here: by its name, or by its path if its environment is not active."""
    beside = Path(sys.executable).with_name("lorainit")
    return "lorainit" if shutil.which("lorainit") == str(beside) or not beside.exists() else str(beside)
