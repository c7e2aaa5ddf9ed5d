"""Databases for tests: everything runs on SQLite and on a real PostgreSQL, through the real migrations.

`session`: one transaction, rolled back at the end; whatever opens a session joins it.
`service`: real commits, for what needs several connections; all rows are deleted afterwards.
"""

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

# Models here are tiny: a second thread helps none of them, and the waiting of several processes'
# threads for each other made the suite several times slower. Before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import structlog
from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker

from api.core import catalogue, db, devices, migrate, places, queue, rates, settings, storage, traces
from tests import servers


@pytest.fixture(scope="session", autouse=True)
def _plain_logs() -> None:
    """One JSON object a line, as in production; the default draws tracebacks for seconds."""
    structlog.configure(processors=[structlog.processors.format_exc_info, structlog.processors.JSONRenderer()])


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL of a PostgreSQL server that lives as long as the test run."""
    with servers.postgres() as url:
        yield url


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    """The URL of a Valkey server that lives as long as the test run."""
    with servers.valkey() as url:
        yield url


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A migrated database of each kind."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path_factory.mktemp('database')}/test.db"
    else:
        url = servers.new_database(request.getfixturevalue("postgres_server"), "test")
    engine = db.make_engine(url)
    migrate.upgrade(engine)
    engine.dispose()
    return url


@pytest.fixture(scope="session")
def engine(database_url: str) -> Iterator[Engine]:
    """One engine per kind of database."""
    engine = db.make_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, database_url: str) -> Iterator[pytest.MonkeyPatch]:
    """Settings that point at this test's database and folder; whatever was cached is made anew."""
    monkeypatch.setenv("LORAINIT_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("LORAINIT_DATABASE_URL", database_url)
    for name in ("STORAGE_URL", "BROKER_URL", "CATALOGUE"):
        monkeypatch.delenv(f"LORAINIT_{name}", raising=False)
    monkeypatch.setattr(places, "MAX_AGE_SECONDS", 0.0)  # the queue as it is now
    forget()
    yield monkeypatch
    forget()


def forget() -> None:
    """Drop every cached setting, engine, storage and queue of this process."""
    for made in (db.get_engine, db.get_reader, db.get_plain_engine):
        if made.is_made:
            made().dispose()
        made.cache_clear()
    for cached in (settings.get_settings, db.get_sessions, storage.get_storage, queue.get_celery, rates.get_limiter):
        cached.cache_clear()
    catalogue.forget()
    devices.forget()
    traces.provider.cache_clear()


@pytest.fixture
def session(environment: pytest.MonkeyPatch, engine: Engine) -> Iterator[Session]:
    """A session whose work is rolled back; `session_scope` joins the same transaction."""
    with engine.connect() as connection:
        transaction = connection.begin()
        sessions = sessionmaker(connection, expire_on_commit=False, join_transaction_mode="create_savepoint")
        with environment.context() as patch:
            patch.setattr(db, "get_engine", lambda: connection)
            patch.setattr(db, "get_reader", lambda: connection)
            patch.setattr(db, "get_sessions", lambda: sessions)
            patch.setattr(db, "plain_connection", lambda: nullcontext(connection))
            with sessions() as session:
                yield session
        transaction.rollback()


@pytest.fixture
def service(environment: pytest.MonkeyPatch, engine: Engine) -> Iterator[None]:
    """The settings in effect, with a database that really commits; emptied afterwards."""
    yield
    with engine.begin() as connection:
        for table in reversed(db.Base.metadata.sorted_tables):
            connection.execute(table.delete())
