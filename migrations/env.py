"""Alembic's entry: which database, which tables, and one migration at a time."""

from alembic import context
from sqlalchemy import Connection, text

from api.core.db import tables  # noqa: F401  (fills the metadata)
from api.core.db.database import Base, make_engine
from api.core.settings import get_settings


def run(connection: Connection) -> None:
    """Migrate on `connection`; batch mode lets SQLite alter tables."""
    if connection.dialect.name == "postgresql":
        # A migration may take its time, and wait for whoever uses the tables.
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        connection.execute(text("SET LOCAL lock_timeout = 0"))
        # Two `migrate` jobs started together must queue up. Released with the transaction.
        connection.execute(text("SELECT pg_advisory_xact_lock(7206506558)"))
    context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True, compare_type=True)
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    engine = make_engine(context.config.get_main_option("sqlalchemy.url") or get_settings().database())
    with engine.begin() as connection:
        run(connection)
