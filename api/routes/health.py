"""Is the process alive, and can it do its work? Outside /v1, without a key."""

import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from api.core import catalogue, logs, migrate, queue, workers
from api.core.db import session_scope
from api.core.settings import get_settings
from api.core.storage import get_storage
from api.schemas.wire import Wire

router = APIRouter(tags=["health"])
REMEMBERED_SECONDS = 5.0
_remembered: dict[str, tuple[float, bool]] = {}


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process runs. Looks at nothing else."""
    return {"status": "ok"}


class Readiness(Wire):
    """What was looked at, and what was found."""

    status: Literal["ready", "not ready"]
    version: str
    checks: dict[str, str | int]


@router.get("/readyz", response_model=Readiness, responses={503: {"model": Readiness}})
def readyz() -> JSONResponse:
    """Jobs can be accepted. No worker, and no broker, is still ready: the rows wait."""
    checks: dict[str, Any] = {"database": "ok", "storage": "ok", "queue": "ok", "migrations": "ok", "workers": 0}
    checks["catalogue"] = "changed and refused" if catalogue.refused() else "ok"
    try:
        with session_scope(read_only=True) as session:
            checks["workers"] = workers.online(session)
            # On a reader: SQLite's writing connection would wait for whoever writes just now.
            if not _lately("migrations", lambda: migrate.at_head(session.connection())):
                checks["migrations"] = "missing"
    except Exception as error:
        logs.get_logger(__name__).warning("database_unavailable", error=str(error))
        checks |= {"database": "unreachable", "migrations": "unknown"}
    if not storage_works():
        checks["storage"] = "unreachable"
    if get_settings().broker_url is None:
        checks["queue"] = "not configured"
    ready = (checks["database"], checks["migrations"], checks["storage"]) == ("ok", "ok", "ok")
    body = {"status": "ready" if ready else "not ready", "version": version("lorainit"), "checks": checks}
    return JSONResponse(body, status_code=200 if ready else 503)


def storage_works() -> bool:
    """A small object could be written, read and deleted within the last few seconds."""
    return _lately("storage", lambda: _works("storage", get_storage().probe))


def broker_works() -> bool:
    """The broker answered within the last few seconds."""
    return _lately("broker", lambda: _works("broker", queue.probe))


def _works(name: str, probe: Callable[[], None]) -> bool:
    try:
        probe()
    except Exception as error:
        logs.get_logger(__name__).warning(f"{name}_unavailable", error=str(error))
        return False
    return True


def _lately(name: str, look: Any) -> bool:
    """What `look` found within the last few seconds."""
    at, found = _remembered.get(name, (0.0, False))
    if not at or time.monotonic() - at > REMEMBERED_SECONDS:
        found = bool(look())
        _remembered[name] = (time.monotonic(), found)
    return found
