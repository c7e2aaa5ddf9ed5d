"""A connection to PostgreSQL that does not wait for a server which has fallen silent.

The server's own timeouts do not run while it is frozen, and TCP's do not either: the kernel goes on acknowledging. So
the driver's waiting, through which every statement, commit and ping goes, is watched from here.
"""

from collections.abc import Generator
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.waiting import READY_NONE

from api.core.breaker import Breaker

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


class Silent(psycopg.OperationalError):
    """The database does not say anything; the connection is given up."""

    def __init__(self) -> None:
        super().__init__("the database is silent; nobody is kept waiting for it until it answers again")


class Connection(psycopg.Connection[Any]):
    """psycopg's connection, given up while `breaker` is open."""

    breaker: Breaker | None = None

    def wait(self, gen: PQGen[Result], interval: float = 0.1, timeout: float | None = None) -> Result:
        """Wait for the server, as psycopg does.

        Raises:
            Silent: it says nothing, to us and to a look that was taken meanwhile.
        """
        if self.breaker is None:
            return super().wait(gen, interval, timeout)
        return super().wait(self._watched(gen, self.breaker), interval, timeout)

    def _watched(self, gen: PQGen[Result], breaker: Breaker) -> Generator[Any, Any, Result]:
        self._give_up_if(breaker)
        heard = breaker.clock()
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if ready == READY_NONE:  # psycopg tells its generators every `interval` that nothing came
                    self._give_up_if(breaker)
                    breaker.doubt(heard)
                else:
                    heard = breaker.clock()
                wanted = gen.send(ready)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]

    def _give_up_if(self, breaker: Breaker) -> None:
        if breaker.is_open:
            self.close()  # in the middle of a statement it is good for nothing; the pool makes a new one
            raise Silent


def connect(breaker: Breaker, *arguments: Any, **parameters: Any) -> Connection:
    """A connection that is watched by `breaker`.

    Raises:
        Silent: the breaker is open.
        psycopg.OperationalError: there is no connection.
    """
    if breaker.is_open:
        raise Silent
    asked = breaker.clock()
    try:
        connection = Connection.connect(*arguments, **parameters)
    except psycopg.errors.ConnectionTimeout:
        breaker.doubt(asked)
        raise
    connection.breaker = breaker
    return connection


def look(*arguments: Any, **parameters: Any) -> None:
    """Connect and ask for a number; an error is an answer, too, and raised."""
    given = {**parameters, "connect_timeout": LOOK_TIMEOUT, "autocommit": True}
    with psycopg.connect(*arguments, **given) as connection:
        connection.execute("SELECT 1")
