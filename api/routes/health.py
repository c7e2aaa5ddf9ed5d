"""Health: whether the process is alive, and whether it can do its work. Outside /v1, without a key."""

import asyncio
from importlib.metadata import version
from typing import Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from api.core.db import migrate
from api.core.db.database import session_scope
from api.core.files.storage import get_storage
from api.core.models import catalogue
from api.core.queue import queue, workers
from api.core.resilience.probes import Probe
from api.core.settings import get_settings
from api.core.singleton import singleton
from api.http.threads import run_in_health_thread
from api.schemas.wire import OTHER_RESPONSES, Wire

router = APIRouter(tags=["health"], responses=OTHER_RESPONSES)
DATABASE_SECONDS = 1.0  # for which a result is reused, so that many clients cost one query


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process runs. Nothing else is checked."""
    return {"status": "ok"}


class Readiness(Wire):
    """What was checked, and the results."""

    status: Literal["ready", "not ready"]
    version: str
    checks: dict[str, str | int]


@router.get("/readyz", response_model=Readiness, responses={503: {"model": Readiness}})
async def readyz() -> JSONResponse:
    """Whether jobs can be accepted: also without a worker or a broker, because jobs wait. Answers in a few seconds."""
    # The checks run at the same time, so that together they take no longer than the slowest of them.
    database = _database()
    works, stores, refused = await asyncio.gather(
        run_in_health_thread(database.works),
        run_in_health_thread(storage_works),
        run_in_health_thread(catalogue.get_refusal),
    )
    checks: dict[str, Any] = {"database": "ok", "storage": "ok", "queue": "ok", "migrations": "ok", "workers": 0}
    checks["catalogue"] = "changed and refused" if refused else "ok"
    checks |= (works and database.found) or {"database": "unreachable", "migrations": "unknown"}
    if not stores:
        checks["storage"] = "unreachable"
    if get_settings().broker_url is None:
        checks["queue"] = "not configured"
    ready = (checks["database"], checks["migrations"], checks["storage"]) == ("ok", "ok", "ok")
    body = {"status": "ready" if ready else "not ready", "version": version("lorainit"), "checks": checks}
    return JSONResponse(body, status_code=200 if ready else 503)


def storage_works() -> bool:
    """Small objects can be written, read and deleted."""
    return _storage().works()


def broker_works() -> bool:
    """The broker answers."""
    return _broker().works()


def forget() -> None:
    """Forget all results, as in a process that has just started."""
    for probe in (_database, _storage, _broker):
        probe.cache_clear()


@singleton
def _database() -> Probe[dict[str, str | int]]:
    return Probe("database", _check_database, good_seconds=DATABASE_SECONDS)


@singleton
def _storage() -> Probe[None]:
    return Probe("storage", lambda: get_storage().probe())


@singleton
def _broker() -> Probe[None]:
    return Probe("broker", lambda: queue.probe())


def _check_database() -> dict[str, str | int]:
    # A reading session, because SQLite's writing connection would wait for other writers.
    with session_scope(read_only=True) as session:
        migrated = migrate.is_at_head(session.connection())
        return {"migrations": "ok" if migrated else "missing", "workers": workers.count_online(session)}
