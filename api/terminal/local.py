"""What the commands on the server's own machine share: its folder, its settings, its database."""

import os
from pathlib import Path
from typing import Annotated

from typer import Option

from api.terminal.client import Problem

State = Annotated[Path | None, Option("--state", help="Folder of database, files and logs (LORAINIT_STATE_DIR).")]


def configure(**options: Path | str | int | None) -> None:
    """Options are settings: written where this process and its children read them."""
    names = {"state": "LORAINIT_STATE_DIR", "host": "LORAINIT_HOST", "port": "LORAINIT_PORT"}
    for option, value in options.items():
        if value is not None:
            os.environ[names[option]] = str(value)


def require_database() -> None:
    """Refuse to go on where no migrated database is.

    Raises:
        Problem: there is none.
    """
    from sqlalchemy.engine import make_url

    from api.core import migrate
    from api.core.db import get_engine
    from api.core.settings import get_settings

    settings = get_settings()
    if (settings.database_url is None and not settings.state_dir.is_dir()) or not migrate.is_current(get_engine()):
        url = make_url(settings.database()).render_as_string(hide_password=True)
        raise Problem(f"no database at {url}; `lorainit serve` or `lorainit migrate` makes it.")
