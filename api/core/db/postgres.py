"""A connection to PostgreSQL that does not wait for a server which has fallen silent.

The server's own timeouts do not run while it is frozen, and TCP's do not either: the kernel goes on acknowledging. So
the driver's waiting, through which every statement, commit and ping goes, is watched from here.
"""

from collections.abc import Generator
from typing import Any, ClassVar, Self, TypeVar, cast

import psycopg
from psycopg.abc import PQGen, PQGenConn
from psycopg.waiting import READY_NONE

from api.core.resilience.breaker import Breaker

Result = TypeVar("Result")

LOOK_TIMEOUT = 4  # seconds until a look gives up its connection and another begins
PARAMETERS: dict[str, Any] = {
    "connect_timeout": 3,
    # A peer that acknowledges nothing, or a network that carries nothing: milliseconds, and seconds.
    "tcp_user_timeout": 15_000,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 2,
}


class DatabaseSilent(psycopg.OperationalError):
    """The database does not say anything; the connection is given up."""

    def __init__(
        self, message: str = "the database is silent; nobody waits until it answers again", **more: Any
    ) -> None:
        super().__init__(message, **more)


class Connection(psycopg.Connection[Any]):
    """psycopg's connection, given up while `breaker` is open: a class of its own per breaker (`watched_by`)."""

    breaker: ClassVar[Breaker]

    @classmethod
    def _connect_gen(cls, conninfo: str = "") -> PQGenConn[Self]:
        return _watched(super()._connect_gen(conninfo), cls.breaker)

    def wait(self, gen: PQGen[Result], interval: float = 0.1, timeout: float | None = None) -> Result:
        """Wait for the server, as psycopg does.

        Raises:
            DatabaseSilent: it says nothing, to us and to a look that was taken meanwhile.
        """
        try:
            return super().wait(_watched(gen, self.breaker), interval, timeout)
        except DatabaseSilent:
            self.close()  # in the middle of a statement it is good for nothing; the pool makes a new one
            raise


def connection_class(breaker: Breaker) -> type[Connection]:
    """Connections that are given up while `breaker` is open, and that tell it when they hear nothing."""

    class WatchedConnection(Connection):
        pass

    WatchedConnection.breaker = breaker
    return WatchedConnection


def _watched(gen: Generator[Any, Any, Result], breaker: Breaker) -> Generator[Any, Any, Result]:
    heard = breaker.clock()
    try:
        _refuse_if_open(breaker)
        wanted = next(gen)
        while True:
            ready = yield wanted
            if ready == READY_NONE:  # psycopg tells its generators every `interval` that nothing came
                _refuse_if_open(breaker)
                breaker.report_silence(heard)
            else:
                heard = breaker.clock()
            wanted = gen.send(ready)
    except StopIteration as end:
        return cast(Result, end.value)


def _refuse_if_open(breaker: Breaker) -> None:
    if breaker.is_open:
        raise DatabaseSilent


def probe(*arguments: Any, **parameters: Any) -> None:
    """Connect and ask for a number; an error is an answer, too, and raised."""
    given = {**parameters, "connect_timeout": LOOK_TIMEOUT, "autocommit": True}
    with psycopg.connect(*arguments, **given) as connection:
        connection.execute("SELECT 1")
