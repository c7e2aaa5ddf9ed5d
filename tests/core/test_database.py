"""What the engine asks of PostgreSQL."""

import time

import pytest
from sqlalchemy import text

from api.core import db
from tests import servers
from worker.patience import PASSING


def test_a_transaction_that_sleeps_lets_go_of_its_rows(postgres_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(db, "IDLE_SECONDS", 0.5)
    engine = db.make_engine(servers.new_database(postgres_server, "idle"))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE rows (id int)"))
        connection.execute(text("INSERT INTO rows VALUES (1)"))
    sleeper = engine.connect()
    sleeper.execute(text("UPDATE rows SET id = 2"))
    began = time.monotonic()
    with engine.begin() as connection:
        connection.execute(text("UPDATE rows SET id = 3"))
    assert 0.3 < time.monotonic() - began < 10
    with pytest.raises(PASSING):
        sleeper.execute(text("SELECT 1"))
    sleeper.invalidate()
    sleeper.close()
    engine.dispose()
