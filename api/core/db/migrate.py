"""Migrates the database to the newest revision, and checks whether it is there.

A database of a newer release is refused, because this release does not know what its migrations changed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine

from api.core.db.database import Base


def _config() -> Config:
    import migrations

    config = Config()
    config.set_main_option("script_location", next(iter(migrations.__path__)))
    config.set_main_option("file_template", "%%(year)d_%%(month).2d_%%(day).2d_%%(slug)s")
    return config


class UnknownRevision(Exception):
    """A revision that this release does not have; the message says what to do."""


def upgrade(engine: Engine) -> None:
    """Run every migration that is missing; all or none, so that a failed upgrade leaves the database as it was.

    Raises:
        UnknownRevision: the database was made by a newer release.
    """
    _refuse_newer(engine)
    _move(engine, partial(command.upgrade, revision="head"))


def downgrade(engine: Engine, revision: str) -> None:
    """Undo every migration after `revision`; all or none. What only these tables and columns held is lost.

    Raises:
        UnknownRevision: this release has no such revision, or the database was made by a newer one.
    """
    _refuse_newer(engine)
    if revision not in _list_revisions():
        raise UnknownRevision(f"there is no revision {revision!r}; the changelog names that of each release.")
    _move(engine, partial(command.downgrade, revision=revision))


def _move(engine: Engine, change: Callable[[Config], None]) -> None:
    config = _config()
    with engine.connect() as connection, _foreign_keys_off(connection), connection.begin():
        config.attributes["connection"] = connection
        change(config)


def _list_revisions() -> set[str]:
    return {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}


def _refuse_newer(engine: Engine) -> None:
    with engine.connect() as connection:
        unknown = set(MigrationContext.configure(connection).get_current_heads()) - _list_revisions()
    if unknown:
        raise UnknownRevision(
            f"the database is at revision {', '.join(sorted(unknown))}, which this release does not know: it was"
            " migrated by a newer one. Run that one, or let it undo its migrations: docs/upgrade.md."
        )


@contextmanager
def _foreign_keys_off(connection: Connection) -> Iterator[None]:
    """Allow a migration to replace tables in SQLite, which refuses to drop a table that other rows refer to.

    SQLite changes a constraint by rebuilding the table. The switch that allows it works only outside a transaction,
    so it is set on the driver's own connection.
    """
    if connection.dialect.name != "sqlite":
        yield
        return
    driver = connection.connection.driver_connection
    assert driver is not None
    driver.execute("PRAGMA foreign_keys=OFF")
    try:
        yield
        assert not driver.execute("PRAGMA foreign_key_check").fetchall(), (
            "a migration left rows whose foreign keys refer to no row"
        )
    finally:
        driver.execute("PRAGMA foreign_keys=ON")


def is_current(engine: Engine) -> bool:
    """True when the database is at the newest revision."""
    with engine.connect() as connection:
        return is_at_head(connection)


def is_at_head(connection: Connection) -> bool:
    """True when this connection sees a database at the newest revision."""
    current = MigrationContext.configure(connection).get_current_heads()
    return set(current) == set(ScriptDirectory.from_config(_config()).get_heads())


def find_drift(engine: Engine) -> list[object]:
    """Differences between the migrated database and the tables in code; empty when none."""
    with engine.connect() as connection:
        return list(
            compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), Base.metadata)
        )


def write_revision(engine: Engine, message: str) -> None:
    """Write a migration from the differences (a developer's command)."""
    config = _config()
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.revision(config, message, autogenerate=True)
