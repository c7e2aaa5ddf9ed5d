"""A connection is given up when its server is silent, and never because a statement takes long."""

import itertools
from collections.abc import Callable, Iterator

import psycopg
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError

from api.core.db import postgres
from api.core.db.database import Waits, make_engine
from api.core.resilience.breaker import Breaker


def connection_with(url: str, start: Callable[[Callable[[], None]], None]) -> postgres.Connection:
    """A connection for which a second passes whenever somebody looks at the clock."""
    seconds = itertools.count()
    made = Breaker("database", lambda: None, clock=lambda: float(next(seconds)), start=start)
    return postgres.connection_class(made).connect(url)


def test_a_server_that_is_silent_for_a_look_too_is_given_up(postgres_server: str) -> None:
    looks: list[Callable[[], None]] = []
    connection = connection_with(postgres_server, looks.append)  # begun, and without an end
    looks.clear()
    connection.breaker._watching, connection.breaker._began = False, None
    with pytest.raises(postgres.DatabaseSilent):
        connection.execute("SELECT pg_sleep(60)")
    assert (len(looks), connection.closed) == (1, True)


def test_a_statement_that_takes_long_is_left_alone_while_the_server_answers_a_look(postgres_server: str) -> None:
    looks: list[None] = []

    def in_time(look: Callable[[], None]) -> None:
        looks.append(None)
        look()

    with connection_with(postgres_server, in_time) as connection:
        looks.clear()
        assert connection.execute("SELECT pg_sleep(0.7), 7").fetchone() == ("", 7)
    assert looks


def test_nothing_is_asked_of_a_server_that_is_known_to_be_silent(postgres_server: str) -> None:
    connection = connection_with(postgres_server, lambda _: None)
    connection.breaker._open = True
    with pytest.raises(postgres.DatabaseSilent):
        connection.execute("SELECT 1")
    assert connection.closed
    with pytest.raises(postgres.DatabaseSilent):
        type(connection).connect(postgres_server)


def test_a_look_at_a_server_that_answers_passes_and_one_at_none_is_an_error(postgres_server: str) -> None:
    postgres.probe(postgres_server)
    with pytest.raises(psycopg.OperationalError):
        postgres.probe(postgres_server.replace("host=/", "host=/nowhere/"))


@pytest.fixture
def brief(database_url: str) -> Iterator[Engine]:
    engine = make_engine(database_url, waits=Waits(connection=0.1, lock=0.1))
    yield engine
    engine.dispose()


def test_a_lock_that_somebody_holds_is_not_waited_for_for_long(brief: Engine, engine: Engine) -> None:
    take = "LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE" if engine.dialect.name == "postgresql" else "SELECT 1"
    with engine.connect() as holder, holder.begin():
        holder.execute(text(take))
        with pytest.raises(OperationalError), brief.connect() as waiting:
            waiting.execute(text("DELETE FROM jobs WHERE id = 'none'"))
