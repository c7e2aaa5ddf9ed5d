"""`lorainit keys`: make, list and delete API keys on the server's machine. The first admin key comes from here."""

from typing import Annotated, Literal

import typer
from typer import Argument, Option

from api.cli import tables
from api.cli.client import Problem
from api.cli.console import err, out
from api.cli.local import State, configure, require_database

LONGEST_NAME = 255

app = typer.Typer(no_args_is_help=True, help="API keys (on the server's machine).")


@app.command("create")
def create(
    state: State = None,
    project: Annotated[str, Option(help="Project, created when it is new.")] = "default",
    name: Annotated[str, Option(help="What the key is for.")] = "command line",
    role: Annotated[
        Literal["admin", "member"],
        Option(help="An admin also manages the project's keys and may order at high priority."),
    ] = "member",
) -> None:
    """Make an API key. It is printed once, on standard output, and kept only as a hash."""
    for option, text in (("--project", project), ("--name", name)):
        if not text.strip() or not text.isprintable() or len(text) > LONGEST_NAME:
            raise Problem(f"{option} must be a name of 1 to {LONGEST_NAME} printable characters (got {text[:80]!r}).")
    configure(state=state)
    from api.core.access import keys
    from api.core.db.database import session_scope

    require_database()
    with session_scope() as session:
        owner = keys.get_or_create_project(session, project)
        key, secret = keys.create_key(session, owner, name=name, role=role)
        session.commit()
    err.print(f"{key.id} ({key.role}) of project {project}, {owner.id}; it is shown only now:", style="dim")
    out.print(secret)


@app.command("list")
def list_keys(state: State = None) -> None:
    """List the keys that are not deleted, without their secrets."""
    configure(state=state)
    from api.core.access import keys
    from api.core.db.database import session_scope

    require_database()
    with session_scope(read_only=True) as session:
        rows = [
            (key.id, project.name, key.role, key.name, f"...{key.hint}", f"{key.created_at:%Y-%m-%d %H:%M}")
            for key, project in keys.list_all(session)
        ]
    out.print(tables.make_table(("key", "project", "role", "name", "ends in", "made"), rows), soft_wrap=False)


@app.command("delete")
def delete(key: Annotated[str, Argument(help="Id of the key: key_...")], state: State = None) -> None:
    """Delete a key. Requests with it are refused from now on."""
    configure(state=state)
    from api.core.access import keys
    from api.core.db.database import session_scope

    require_database()
    with session_scope() as session:
        if not keys.delete_key(session, key):
            raise Problem(f"there is no key {key}.")
        session.commit()
    out.print(f"{key} deleted")
