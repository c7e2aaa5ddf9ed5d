"""Which files an event passes on its way from the library to the event stream of a client.

A step's `Metrics` is followed through a run of the library, the worker that supervises it, the database, and the API
that is asked for the stream. A file counts if one of its functions is given or returns the event: as the library's
object, as a line of the pipe, as a line of the job's events, as a row of the database, as an object of the wire or as
text of the stream, alone or in a list. `tests/test_event_walk.py` makes the walk.

`python -m tests.event_walk SPEC FOUND ...` is the child of that worker: the library, with a spec of its own, which
writes what it has found into the file FOUND.
"""

import json
import sys
from pathlib import Path
from typing import Any

from sqlalchemy import Row

from api.core.jobs.events import EventDraft
from api.http.event_poller import NewEvents
from api.schemas.event import EventObject
from lorainit.config.events import Metrics
from tests.lorainit.walk import Walk, followed

ROOT = Path(__file__).parents[1]
FOLDERS = ("lorainit/", "worker/", "api/")
LINES = ('"kind":"metrics"', "event: metrics")  # of the pipe and of the stream


def is_event(value: Any, depth: int = 0) -> bool:
    """Whether a value is the event, in one of its shapes, or a list that holds it."""
    if isinstance(value, Metrics | NewEvents):
        return True
    if isinstance(value, EventDraft | EventObject | Row):
        return getattr(value, "type", "") == "metrics"
    if isinstance(value, bytes):
        return any(line.encode() in value for line in LINES)
    if isinstance(value, str):
        return any(line in value for line in LINES)
    if type(value).__name__ == "async_generator_wrapped_value":
        return True  # nobody can look into it; no other async generator of ours has a value here
    if isinstance(value, dict) and "body" in value:  # a message of ASGI
        return is_event(value["body"])
    return type(value) in (list, tuple) and depth < 2 and any(is_event(one, depth + 1) for one in value)


def make_walk() -> Walk:
    """A walk that follows the event through all of the service."""
    return Walk(f"{ROOT}/", is_event, folders=FOLDERS)


def main(spec: str, found: str, *arguments: str) -> int:
    """The child: arguments are those of `python -m lorainit`, of which the spec is replaced."""
    from lorainit import __main__ as library

    with followed(make_walk()) as files:
        code = library.main([spec, *arguments[1:]])
    Path(found).write_text(json.dumps(files))
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
