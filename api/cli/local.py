"""What the commands on the server's own machine share: its folder, its settings, its database."""

import os
import sys
from pathlib import Path
from typing import Annotated

from typer import Option

from api.cli.client import Problem

EXAMPLES = Path(__file__).parents[2] / "examples"  # of a clone of the repository
State = Annotated[Path | None, Option("--state", help="Folder of database, files and logs (LORAINIT_STATE_DIR).")]


def configure(**options: Path | str | int | None) -> None:
    """Write options into the environment, where this process and its children read their settings."""
    names = {"state": "LORAINIT_STATE_DIR", "host": "LORAINIT_HOST", "port": "LORAINIT_PORT"}
    for option, value in options.items():
        if value is not None:
            os.environ[names[option]] = str(value)


def explain(error: Exception) -> str | None:
    """One line for an error of the machine or its configuration; None for an error of this program."""
    if "sqlalchemy" not in sys.modules and not isinstance(error, OSError | ValueError):
        return None  # not an error of the database, because SQLAlchemy is not loaded; loading it now takes long
    from sqlalchemy.exc import DBAPIError, SQLAlchemyError

    from api.core.db.migrate import UnknownRevision
    from api.core.maintenance.startup import OpenFolder
    from api.core.models.catalogue_file import BadCatalogue
    from api.core.settings import BadSettings, get_settings

    if isinstance(error, BadSettings | BadCatalogue | OpenFolder | UnknownRevision):
        return str(error)
    if isinstance(error, SQLAlchemyError):
        said = str(error.orig if isinstance(error, DBAPIError) else error).strip() or type(error).__name__
        return f"the database at {_shown(get_settings().database())} cannot be used: {' '.join(said.split())[:300]}"
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return None


def _shown(url: str) -> str:
    """A database's URL without its password."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).render_as_string(hide_password=True)
    except (ArgumentError, ValueError):
        return "LORAINIT_DATABASE_URL"


def require_database() -> None:
    """Refuse to go on without a migrated database.

    Raises:
        Problem: there is none.
    """
    from api.core.db import migrate
    from api.core.db.database import get_engine
    from api.core.settings import get_settings

    settings = get_settings()
    if (settings.database_url is None and not settings.state_dir.is_dir()) or not migrate.is_current(get_engine()):
        raise Problem(f"no database at {_shown(settings.database())}; `lorainit serve` or `lorainit migrate` makes it.")
