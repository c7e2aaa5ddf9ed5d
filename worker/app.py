"""The Celery worker: its tasks, a heartbeat row while it lives, and a drain flag when it shuts down.

celery -A worker.app worker --without-gossip --without-mingle --without-heartbeat

How many processes it has, and which queues it listens on, is in the settings (worker/pool.py).
"""

import os
import secrets
import socket
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from celery.signals import (
    celeryd_init,
    setup_logging,
    worker_init,
    worker_process_init,
    worker_ready,
    worker_shutdown,
    worker_shutting_down,
)

from api.core.db.database import get_engine, get_reader, get_sessions, session_scope
from api.core.devices import devices
from api.core.files.storage import get_storage
from api.core.logs import configure, get_logger
from api.core.maintenance import startup
from api.core.models import catalogue
from api.core.queue import workers
from api.core.queue.queue import get_celery
from api.core.settings import get_settings
from worker import pool
from worker.host import caches, scratch

app = get_celery()
app.conf.imports = ("worker.tasks",)

_stopped = threading.Event()
# Random, because process numbers repeat. Made before the worker's processes are forked, so that all have the same.
_BIRTH = secrets.token_hex(8)


def get_worker_name(pid: int) -> str:
    """The public name of the worker whose parent process is `pid`."""
    return f"{socket.gethostname()}:{pid}"


def drain_file(pid: int) -> Path:
    """The file that exists while the worker whose parent process is `pid` shuts down and its jobs have to be requeued.

    Its name is unique, because several hosts may share the scratch folder.
    """
    return get_settings().scratch() / f"{scratch.FLAG}{socket.gethostname()}-{pid}-{_BIRTH}"


def unhealthy_file(pid: int, slot: int | str) -> Path:
    """The file that exists while a slot of that worker takes no job because its GPU failed. It contains the reason."""
    return get_settings().scratch() / f"{scratch.UNHEALTHY}{socket.gethostname()}-{pid}-{_BIRTH}-{slot}"


@app.on_configure.connect  # type: ignore[union-attr, untyped-decorator]
def _check(**_: Any) -> None:
    # Runs first, because Celery reads our settings next and would print a traceback if one is wrong.
    startup.check_or_exit()


@celeryd_init.connect  # type: ignore[untyped-decorator]
def _check_options(options: Mapping[str, Any], **_: Any) -> None:
    if why := pool.find_conflict(options):
        sys.exit(f"error: {why}")


@worker_init.connect  # type: ignore[untyped-decorator]
def _listen(sender: Any, **_: Any) -> None:
    # Done after the command line was read and before the processes are forked, so that all have the same queues.
    sender.app.amqp.queues.select(devices.list_served_queues() or get_settings().queues())


@setup_logging.connect  # type: ignore[untyped-decorator]
def _logs(**_: Any) -> None:
    configure()
    for fault in catalogue.find_missing_sources():
        get_logger(__name__).error("a base model is not on this host; its jobs will fail", fault=fault)


@worker_ready.connect  # type: ignore[untyped-decorator]
def _ready(**_: Any) -> None:
    settings, found = get_settings(), devices.list_gpus()
    log = get_logger(__name__)
    log.info("the worker is ready", slots=settings.worker_slots, device=devices.device(), gpus=found)
    left = sorted(set(settings.queues()) - set(devices.list_served_queues()))
    if devices.may_take_a_job(settings.worker_slots) and left:
        log.warning("jobs of these queues ask for another device and are not taken", queues=left)
    threading.Thread(target=_send_heartbeats, name="heartbeat", daemon=True).start()


@worker_process_init.connect  # type: ignore[untyped-decorator]
def _child(**_: Any) -> None:
    # Forget what the parent made, because its connections and its threads cannot be used after a fork.
    for engine in (get_engine, get_reader):
        if engine.is_made:
            engine().dispose(close=False)
    for made in (get_engine, get_reader, get_sessions, get_storage):
        made.cache_clear()


@worker_shutting_down.connect  # type: ignore[untyped-decorator]
def _drain(**_: Any) -> None:
    scratch.raise_flag(drain_file(os.getpid()))


@worker_shutdown.connect  # type: ignore[untyped-decorator]
def _gone(**_: Any) -> None:
    _stopped.set()
    drain_file(os.getpid()).unlink(missing_ok=True)


def _count_usable_slots() -> tuple[int, str | None]:
    """How many slots of this worker take jobs, and why the others do not."""
    slots, flags = get_settings().worker_slots, unhealthy_file(os.getpid(), "*")
    if why := devices.find_problem(slots):
        return 0, why
    unhealthy = list[str]()
    for flag in flags.parent.glob(flags.name):
        with suppress(FileNotFoundError):  # its GPU has just become usable again
            unhealthy.append(flag.read_text())
    return max(0, slots - len(unhealthy)), " ".join(dict.fromkeys(unhealthy)) or None


def _send_heartbeats() -> None:
    log, me, started = get_logger(__name__), get_worker_name(os.getpid()), datetime.now(UTC)
    while True:
        try:
            slots, problem = _count_usable_slots()
            with session_scope() as session:
                workers.record_heartbeat(
                    session, me, slots=slots, queues=devices.list_served_queues(), started_at=started, problem=problem
                )
                session.commit()
        except Exception as error:  # any, because the thread has to go on when the database is back
            log.warning("heartbeat failed", error=str(error))
        try:
            scratch.sweep()
        except Exception as error:
            log.warning("the scratch folder could not be swept", error=str(error))
        try:
            caches.sweep()
        except Exception as error:
            log.warning("the cache could not be swept", error=str(error))
        if _stopped.wait(10):
            return
