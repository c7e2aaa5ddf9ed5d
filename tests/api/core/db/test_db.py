"""What SQLite keeps of what was deleted."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import delete, text

from api.core.db import database, migrate
from api.core.db.database import session_scope
from api.core.db.tables import Counter
from tests.conftest import forget

WORD = "zanzibarquince"


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The write-ahead log of a database of this test's own."""
    monkeypatch.setenv("LORAINIT_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("LORAINIT_DATABASE_URL", f"sqlite:///{tmp_path}/own.db")
    forget()
    migrate.upgrade(database.get_engine())
    yield tmp_path / "own.db-wal"
    forget()


def write_and_delete() -> None:
    with session_scope() as session:
        session.add(Counter(name=WORD, labels="{}", value=1.0))
        session.commit()
    with session_scope() as session:
        session.execute(delete(Counter))
        session.commit()


def test_what_was_deleted_is_neither_in_the_database_nor_in_its_log(log: Path) -> None:
    write_and_delete()
    assert WORD.encode() in log.read_bytes()
    database.cut_write_ahead_log()
    assert log.stat().st_size == 0
    assert WORD.encode() not in log.with_name("own.db").read_bytes()


def test_a_log_that_somebody_reads_is_cut_the_next_time_and_nobody_waits(log: Path) -> None:
    with session_scope(read_only=True) as reader:
        reader.execute(text("SELECT count(*) FROM counters")).all()
        write_and_delete()
        database.cut_write_ahead_log()
        assert log.stat().st_size > 0
    with session_scope(read_only=True) as session:
        assert session.execute(text("PRAGMA busy_timeout")).scalar() == 1000 * database.LONG_WAITS.lock
    database.cut_write_ahead_log()
    assert log.stat().st_size == 0
