"""Engines, sessions and the clock, for SQLite and PostgreSQL. Migrations create the tables.

SQLite runs in WAL mode and starts every writing transaction with BEGIN IMMEDIATE, because one that reads
first and writes later would otherwise fail with "database is locked" instead of waiting. Sessions
for reading (`read_only=True`) use BEGIN and never wait for a writer.

Every wait has an end (docs/decisions/0038): for a connection, for a lock, for a statement, and for a server that does
not answer.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from sqlalchemy import (
    JSON,
    Connection,
    DateTime,
    Dialect,
    Engine,
    MetaData,
    Row,
    Select,
    create_engine,
    event,
    func,
    select,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Session, sessionmaker
from sqlalchemy.pool import QueuePool
from sqlalchemy.types import TypeDecorator, TypeEngine

from api.core.db import postgres
from api.core.resilience.breaker import Breaker
from api.core.settings import get_settings
from api.core.singleton import singleton

# No transaction around a statement, because beginning and ending one takes longer than a short statement.
_PLAIN: dict[str, Any] = {
    "isolation_level": "AUTOCOMMIT",
    "skip_autocommit_rollback": True,
    "pool_reset_on_return": None,
}


@dataclass(frozen=True)
class Waits:
    """Seconds that this process waits for a connection of its pool, and for a lock that another transaction holds."""

    connection: float
    lock: float


LONG_WAITS = Waits(connection=30.0, lock=30.0)  # long, because a worker that gave up would only try again
SHORT_WAITS = Waits(connection=2.0, lock=2.5)  # short, so that a client is answered within five seconds
_STATEMENT_SECONDS = 60  # far above what any statement needs, so that only a broken one is ended


class UTCDateTime(TypeDecorator[datetime]):
    """A point in time, always UTC and always aware; SQLite alone would lose the zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, _dialect: Dialect) -> datetime | None:
        """Refuse naive times, store UTC."""
        if value is not None and value.tzinfo is None:
            raise ValueError("naive datetime")
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, _dialect: Dialect) -> datetime | None:
        """Return aware UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Json(TypeDecorator[Any]):
    """JSON, indexable on PostgreSQL; Python's None is SQL's NULL."""

    impl = JSON(none_as_null=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """JSONB on PostgreSQL."""
        return dialect.type_descriptor(
            JSONB(none_as_null=True) if dialect.name == "postgresql" else JSON(none_as_null=True)
        )


class Base(DeclarativeBase):
    """Tables, with a naming convention so that migrations can name every constraint."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


def make_engine(url: str, *, read_only: bool = False, plain: bool = False, waits: Waits = LONG_WAITS) -> Engine:
    """An engine for `url` with the settings each database needs.

    Args:
        read_only: matters to SQLite alone.
        plain: for single statements that only read: no transaction, and no check of the connection before it.
    """
    if make_url(url).get_backend_name() == "sqlite":
        return _sqlite(url, waits, read_only=read_only, plain=plain)
    return _postgresql(url, waits, plain=plain)


def _postgresql(url: str, waits: Waits, *, plain: bool) -> Engine:
    # The first limit is so that a process which freezes inside a transaction locks its rows for a minute at most.
    # None of our transactions is open during slow work, so it does not cut one that makes progress.
    limits = {
        "idle_in_transaction_session_timeout": 60.0,
        "statement_timeout": _STATEMENT_SECONDS,
        "lock_timeout": waits.lock,
    }
    options = " ".join(f"-c {name}={round(seconds * 1000)}" for name, seconds in limits.items())
    engine = create_engine(
        url,
        pool_pre_ping=not plain,
        pool_size=10,
        max_overflow=10 if plain else 30,
        pool_timeout=waits.connection,
        connect_args={**postgres.PARAMETERS, "options": options},
        # Otherwise logged errors would show the parameters of statements, such as labels and digests of keys.
        hide_parameters=True,
        **(_PLAIN if plain else {}),
    )
    arguments, parameters = engine.dialect.create_connect_args(engine.url)
    breaker = Breaker("database", partial(postgres.probe, *arguments, **parameters))
    connections = postgres.connection_class(breaker)
    event.listen(engine, "do_connect", lambda _, __, given, named: connections.connect(*given, **named))
    return engine


def _sqlite(url: str, waits: Waits, *, read_only: bool, plain: bool) -> Engine:
    # One writing connection per process: its writers wait in the pool, in order, and wake at once, because
    # SQLite's own waiting sleeps up to 100 ms between two tries. Readers never wait for a writer.
    pool = {"pool_size": 20, "max_overflow": 20} if read_only else {"pool_size": 1, "max_overflow": 0}
    engine = create_engine(
        url,
        poolclass=QueuePool,
        pool_timeout=waits.connection,
        connect_args={"timeout": waits.lock, "check_same_thread": False, "isolation_level": None},
        hide_parameters=True,
        **pool,
        **(_PLAIN if plain else {}),
    )
    event.listen(engine, "connect", _sqlite_connect)
    if plain:
        return engine
    start = "BEGIN" if read_only else "BEGIN IMMEDIATE"
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(start))
    return engine


def _sqlite_connect(connection: Any, _record: object) -> None:
    # FULL: so that an accepted job survives a power cut, and not only a crash of ours.
    # secure_delete: deleted rows are overwritten with zeros, because they may quote training data.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}")


class _Process:
    """How long this process waits."""

    waits = LONG_WAITS


def use_short_waits() -> None:
    """Wait only briefly in this process, because clients wait for its answers. Call this before its first session."""
    _Process.waits = SHORT_WAITS


@singleton
def get_engine() -> Engine:
    """This process's engine, made on first use."""
    return make_engine(get_settings().database(), waits=_Process.waits)


@singleton
def get_reader() -> Engine:
    """The engine for sessions that only read; the same one on PostgreSQL."""
    url = get_settings().database()
    return make_engine(url, read_only=True, waits=_Process.waits) if url.startswith("sqlite") else get_engine()


@singleton
def get_plain_engine() -> Engine:
    """The engine for single statements that only read (`find_row`)."""
    return make_engine(get_settings().database(), read_only=True, plain=True, waits=_Process.waits)


@singleton
def get_sessions() -> sessionmaker[Session]:
    """This process's session factory."""
    return sessionmaker(get_engine(), expire_on_commit=False)


def cut_write_ahead_log() -> None:
    """Write SQLite's log into the database file and truncate it, because the log still holds pages with deleted rows.

    If readers or a writer are active it does less, and the next call does the rest. PostgreSQL needs nothing.
    """
    engine = get_reader()
    if engine.dialect.name != "sqlite":
        return
    connection = engine.raw_connection()
    cursor = connection.cursor()
    try:
        cursor.execute("PRAGMA busy_timeout=100")  # short, because writers wait for as long as this waits for readers
        cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        cursor.execute(f"PRAGMA busy_timeout={round(_Process.waits.lock * 1000)}")
        cursor.close()
        connection.close()


@contextmanager
def session_scope(*, read_only: bool = False) -> Iterator[Session]:
    """A session that rolls back unless its owner commits."""
    with get_sessions()(bind=get_reader() if read_only else get_engine()) as session:
        yield session


def find_row(statement: Select[Any], values: Mapping[str, Any]) -> Row[Any] | None:
    """The one row that a statement finds, or None.

    There is no transaction and no check of the connection around it, because both cost more than such a statement. If
    the connection turns out to be dead, the statement is run again on a new one.
    """
    try:
        return _find_row(statement, values)
    except DBAPIError as error:
        if not error.connection_invalidated:
            raise
        return _find_row(statement, values)


def _find_row(statement: Select[Any], values: Mapping[str, Any]) -> Row[Any] | None:
    with plain_connection() as connection:
        return connection.execute(statement, values).one_or_none()


@contextmanager
def plain_connection() -> Iterator[Connection]:
    """A connection for single statements, each of which is its own transaction."""
    with get_plain_engine().connect() as connection:
        yield connection


def now(session: Session) -> datetime:
    """The database's clock on PostgreSQL (workers' clocks differ), this host's on SQLite."""
    if session.get_bind().dialect.name == "postgresql":
        return session.scalar(select(func.clock_timestamp())) or datetime.now(UTC)
    return datetime.now(UTC)
