"""Databases for tests: everything runs on SQLite and on a real PostgreSQL, through the real migrations.

`session`: one transaction, rolled back at the end; whatever opens a session joins it.
`service`: real commits, for what needs several connections; all rows are deleted afterwards.
"""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path

# Models here are tiny: a second thread helps none of them, and the waiting of several processes'
# threads for each other made the suite several times slower. Before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import structlog
from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker

from api.core import settings, traces
from api.core.access import rate_limits
from api.core.db import database, migrate
from api.core.devices import devices
from api.core.files import storage
from api.core.models import catalogue
from api.core.queue import positions, queue
from tests import servers
from tests.side_by_side import (
    pytest_collection_modifyitems,
    pytest_xdist_auto_num_workers,
    pytest_xdist_make_scheduler,
)

# pytest finds its hooks here
__all__ = ["pytest_collection_modifyitems", "pytest_xdist_auto_num_workers", "pytest_xdist_make_scheduler"]


def pytest_itemcollected(item: pytest.Item) -> None:
    """What is marked `one_database` runs on PostgreSQL only among the slow tests."""
    kind = getattr(item, "callspec", None) and item.callspec.params.get("database_url")  # type: ignore[attr-defined]
    if kind == "postgresql" and item.get_closest_marker("one_database"):
        item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Keep imported objects from garbage collection: to walk them took half of a tiny run."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer Llama and a tokenizer, `model`, and a catalogue that offers it, `catalogue.toml`."""
    from tests.catalogues import describe_base
    from tests.lorainit.conftest import make_tokenizer, tiny_llama  # which loads torch

    folder = tmp_path_factory.mktemp("tiny")
    for part in (tiny_llama(), make_tokenizer()):
        part.save_pretrained(folder / "model")
    (folder / "catalogue.toml").write_text(describe_base(folder / "model", model_id="tiny", root="tests/tiny"))
    return folder


@pytest.fixture(scope="session")
def migrated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The URL of the migrated database of a kind, which is made once: files of tests take turns with the two kinds."""

    @cache
    def make(kind: str) -> str:
        if kind == "sqlite":
            url = f"sqlite:///{tmp_path_factory.mktemp('database')}/test.db"
        else:
            url = servers.new_database(request.getfixturevalue("postgres_server"), "test")
        engine = database.make_engine(url)
        migrate.upgrade(engine)
        engine.dispose()
        return url

    return make


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, migrated: Callable[[str], str]) -> str:
    """A migrated database of each kind."""
    return migrated(request.param)


@pytest.fixture(scope="session")
def engine(database_url: str) -> Iterator[Engine]:
    """One engine per kind of database."""
    engine = database.make_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, database_url: str) -> Iterator[pytest.MonkeyPatch]:
    """Settings that point at this test's database and folder; whatever was cached is made anew."""
    point_at(monkeypatch, database_url, tmp_path)
    yield monkeypatch
    forget()


def point_at(patch: pytest.MonkeyPatch, database_url: str, folder: Path) -> None:
    """Settings of a service with this database and folder, and otherwise as a user finds it."""
    patch.setenv("LORAINIT_STATE_DIR", str(folder))
    patch.setenv("LORAINIT_DATABASE_URL", database_url)
    for name in ("STORAGE_URL", "BROKER_URL", "CATALOGUE"):
        patch.delenv(f"LORAINIT_{name}", raising=False)
    patch.setattr(positions, "MAX_AGE_SECONDS", 0.0)  # the queue as it is now
    forget()


def forget() -> None:
    """Drop every cached setting, engine, storage and queue of this process."""
    for made in (database.get_engine, database.get_reader, database.get_plain_engine):
        if made.is_made:
            made().dispose()
        made.cache_clear()
    for cached in (
        settings.get_settings,
        database.get_sessions,
        storage.get_storage,
        queue.get_celery,
        rate_limits.get_rate_limiter,
    ):
        cached.cache_clear()
    catalogue.forget()
    devices.forget()
    traces.get_provider.cache_clear()


@pytest.fixture
def session(environment: pytest.MonkeyPatch, engine: Engine) -> Iterator[Session]:
    """A session whose work is rolled back; `session_scope` joins the same transaction."""
    with engine.connect() as connection:
        transaction = connection.begin()
        sessions = sessionmaker(connection, expire_on_commit=False, join_transaction_mode="create_savepoint")
        with environment.context() as patch:
            patch.setattr(database, "get_engine", lambda: connection)
            patch.setattr(database, "get_reader", lambda: connection)
            patch.setattr(database, "get_sessions", lambda: sessions)
            patch.setattr(database, "plain_connection", lambda: nullcontext(connection))
            with sessions() as session:
                yield session
        transaction.rollback()


@pytest.fixture
def service(environment: pytest.MonkeyPatch, engine: Engine) -> Iterator[None]:
    """The settings in effect, with a database that really commits; emptied afterwards."""
    yield
    empty(engine)


def empty(engine: Engine) -> None:
    """Delete every row."""
    with engine.begin() as connection:
        for table in reversed(database.Base.metadata.sorted_tables):
            connection.execute(table.delete())
