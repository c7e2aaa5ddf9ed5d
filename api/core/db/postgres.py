"""A connection to PostgreSQL that gives up when the server stops answering.

The server's own timeouts do not run while it is frozen, and TCP's do not either, because the kernel still acknowledges
what it receives. So this module watches the driver's `wait`, which every statement, commit and ping uses.
"""

from collections.abc import Generator
from typing import Any, ClassVar, Self, TypeVar, cast

import psycopg
from psycopg.abc import PQGen, PQGenConn
from psycopg.waiting import READY_NONE

from api.core.resilience.breaker import Breaker

Result = TypeVar("Result")

PROBE_TIMEOUT = 4  # seconds after which a probe gives up its connection, so that the next one can begin
PARAMETERS: dict[str, Any] = {
    "connect_timeout": 3,
    # For a host or a network that is gone. The first is in milliseconds, the others are in seconds.
    "tcp_user_timeout": 15_000,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 2,
}


class DatabaseSilent(psycopg.OperationalError):
    """The database does not answer; the connection was given up."""

    def __init__(
        self, message: str = "the database does not answer; nothing waits for it until it answers again", **more: Any
    ) -> None:
        super().__init__(message, **more)


class Connection(psycopg.Connection[Any]):
    """psycopg's connection, given up while `breaker` is open. Each breaker has its own class (`connection_class`)."""

    breaker: ClassVar[Breaker]

    @classmethod
    def _connect_gen(cls, conninfo: str = "") -> PQGenConn[Self]:
        return _watch(super()._connect_gen(conninfo), cls.breaker)

    def wait(self, gen: PQGen[Result], interval: float = 0.1, timeout: float | None = None) -> Result:
        """Wait for the server, as psycopg does.

        Raises:
            DatabaseSilent: it answered neither this connection nor the probe that was made meanwhile.
        """
        try:
            return super().wait(_watch(gen, self.breaker), interval, timeout)
        except DatabaseSilent:
            self.close()  # it is in the middle of a statement and cannot be used again; the pool makes a new one
            raise


def connection_class(breaker: Breaker) -> type[Connection]:
    """A class of connections that give up while `breaker` is open, and that report to it when no answer comes."""

    class WatchedConnection(Connection):
        pass

    WatchedConnection.breaker = breaker
    return WatchedConnection


def _watch(gen: Generator[Any, Any, Result], breaker: Breaker) -> Generator[Any, Any, Result]:
    last_answer = breaker.clock()
    try:
        _refuse_if_open(breaker)
        wanted = next(gen)
        while True:
            ready = yield wanted
            if ready == READY_NONE:  # psycopg resumes the generator every `interval` even if nothing arrived
                _refuse_if_open(breaker)
                breaker.report_silence(last_answer)
            else:
                last_answer = breaker.clock()
            wanted = gen.send(ready)
    except StopIteration as end:
        return cast(Result, end.value)


def _refuse_if_open(breaker: Breaker) -> None:
    if breaker.is_open:
        raise DatabaseSilent


def probe(*arguments: Any, **parameters: Any) -> None:
    """Connect and run `SELECT 1`. An error is raised, and counts as an answer, too."""
    given = {**parameters, "connect_timeout": PROBE_TIMEOUT, "autocommit": True}
    with psycopg.connect(*arguments, **given) as connection:
        connection.execute("SELECT 1")
