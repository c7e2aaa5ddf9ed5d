"""What this process asks its database."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy.event import listen, remove

from api.core.db import database


@contextmanager
def statements() -> Iterator[list[str]]:
    """The statements that are executed while the context is open, for reading and for writing."""
    seen, engines = list[str](), {database.get_engine(), database.get_reader()}

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.append(statement)

    for engine in engines:
        listen(engine, "before_cursor_execute", note)
    yield seen
    for engine in engines:
        remove(engine, "before_cursor_execute", note)
