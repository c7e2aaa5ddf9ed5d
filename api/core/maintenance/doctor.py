"""`lorainit doctor`: checks from this host whether everything works that the service needs. Changes nothing.

A check is `ok`, `failed`, or `absent`. Absent means not set up here, which is no error: a broker before `lorainit
serve` starts its own, or torch in the API's container.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from api.core.db import migrate
from api.core.db.database import get_engine, now, session_scope
from api.core.files import disk
from api.core.files.disk import Volume, format_bytes
from api.core.files.storage import get_storage
from api.core.models import catalogue
from api.core.queue import queue, workers
from api.core.settings import BadSettings, Settings, find_unknown_variables, get_settings

# Hosts with NTP are closer than this. From 15 minutes on, S3 refuses signed requests.
MAX_SKEW_SECONDS = 2.0


@dataclass(frozen=True)
class Check:
    """The name of a check, its result, and a sentence."""

    name: str
    status: Literal["ok", "failed", "absent"]
    message: str

    def as_json(self) -> dict[str, str]:
        """For programs."""
        return asdict(self)


class Absent(Exception):
    """Not set up here; the message says what would set it up."""


def examine() -> Iterator[Check]:
    """Every check, each as soon as it is done, since one may wait for a server that does not answer.

    If the database fails, checks that need it are left out.
    """
    try:
        settings = get_settings()
    except BadSettings as error:
        yield Check("settings", "failed", str(error))
        return
    yield _check("settings", _settings)
    yield _check("catalogue", _catalogue)
    volumes = {
        volume.name: volume for volume in disk.list_worker_volumes(settings) + disk.list_service_volumes(settings)
    }
    database = _check("database", partial(_database, settings))
    yield database
    if database.status != "failed":  # otherwise these would only fail for the same reason
        yield _check("migrations", partial(_migrations, settings))
        yield _check("clock", partial(_clock, settings))
        yield _check("workers", partial(_workers, settings))
    yield _check("broker", partial(_broker, settings))
    yield _check("storage", partial(_storage, settings))
    for volume in volumes.values():
        yield _check(f"disk of {volume.name}", partial(_disk_space, settings, volume))


def _check(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, "ok", look())
    except Absent as reason:
        return Check(name, "absent", str(reason))
    except Exception as error:  # every driver has errors of its own; all of them are reported
        said = error.orig if isinstance(error, DBAPIError) else error  # without SQLAlchemy's additions
        return Check(name, "failed", " ".join(str(said).split())[:500] or type(error).__name__)


def _settings() -> str:
    if unknown := find_unknown_variables(os.environ):
        raise RuntimeError(f"{', '.join(unknown)}: nothing reads it")
    return "every LORAINIT_ variable is understood"


def _catalogue() -> str:
    known, where = catalogue.load(get_settings().catalogue), get_settings().catalogue or "the built-in catalogue"
    if not known:
        raise RuntimeError(f"{where} offers no base model: `lorainit models inspect` writes an entry")
    if find_spec("torch") is None:
        return f"{where} offers {', '.join(known)}; their files are looked for where the worker runs"
    if missing := catalogue.find_missing_sources():
        raise RuntimeError(f"{where}: {' '.join(missing)}")
    return f"{where} offers {', '.join(known)}"


def _database(settings: Settings) -> str:
    _require_state(settings, "database_url")
    with session_scope(read_only=True) as session:
        session.execute(text("SELECT 1"))
        return f"answers ({session.get_bind().dialect.name})"


def _migrations(settings: Settings) -> str:
    _require_state(settings, "database_url")
    if not migrate.is_current(get_engine()):
        raise RuntimeError(
            "the database is not at the newest revision of this release: run `lorainit migrate`, which says so if it is"
            " at one of a newer release"
        )
    return "the database is at the newest revision"


def _clock(settings: Settings) -> str:
    _require_state(settings, "database_url")
    with session_scope(read_only=True) as session:
        if session.get_bind().dialect.name != "postgresql":
            return "the database has this host's clock"
        session.execute(text("SELECT 1"))  # connect first, so that connecting is not measured as a difference
        before = datetime.now(UTC)
        theirs = now(session)
        after = datetime.now(UTC)
    skew = (theirs - (before + (after - before) / 2)).total_seconds()
    if abs(skew) > MAX_SKEW_SECONDS:
        raise RuntimeError(f"the database's clock differs from this host's by {skew:+.1f} s: set both by NTP")
    return f"the database's clock is {skew * 1000:+.0f} ms from this host's"


def _workers(settings: Settings) -> str:
    _require_state(settings, "database_url")
    with session_scope(read_only=True) as session:
        found, count = workers.find_problems(session), workers.count_online(session)
    if found:
        raise RuntimeError("; ".join(f"{name} takes no job, or not in all slots: {why}" for name, why in found.items()))
    return f"{count} online"


def _broker(settings: Settings) -> str:
    if settings.broker_url is None:
        raise Absent("LORAINIT_BROKER_URL is not set; `lorainit serve` starts a broker of its own")
    queue.probe()
    return "answers"


def _storage(settings: Settings) -> str:
    _require_state(settings, "storage_url")
    get_storage().probe()
    return "an object was written, read and deleted"


def _disk_space(settings: Settings, volume: Volume) -> str:
    if volume.path.exists():
        volume.probe()
    if volume.free < settings.min_free_bytes:
        raise RuntimeError(f"{format_bytes(volume.free)} free, less than LORAINIT_MIN_FREE_BYTES: no job is taken")
    return f"{format_bytes(volume.free)} of {format_bytes(volume.size)} free"


def _require_state(settings: Settings, url: str) -> None:
    if getattr(settings, url) is None and not settings.state_dir.is_dir():
        raise Absent(f"there is no folder {settings.state_dir} yet; `lorainit serve` makes it")


def as_json(checks: list[Check]) -> dict[str, Any]:
    """The checks and whether none failed."""
    return {"ok": all(check.status != "failed" for check in checks), "checks": [check.as_json() for check in checks]}
