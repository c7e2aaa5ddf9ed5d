"""The Celery worker: which tasks, a heartbeat row while it lives, and a drain flag when it leaves.

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
# Made before the worker's children are forked, so they have it too.
_BIRTH = secrets.token_hex(8)


def name(pid: int) -> str:
    """The public name of the worker whose parent process is `pid`."""
    return f"{socket.gethostname()}:{pid}"


def drain_file(pid: int) -> Path:
    """Exists while the worker whose parent process is `pid` wants its jobs back in the queue.

    Several hosts may share the scratch folder, where process numbers repeat: the name is this worker's alone.
    """
    return get_settings().scratch() / f"{scratch.FLAG}{socket.gethostname()}-{pid}-{_BIRTH}"


def unhealthy_file(pid: int, slot: int | str) -> Path:
    """Exists while a slot of that worker takes no job because its GPU has failed, and says why."""
    return get_settings().scratch() / f"{scratch.UNHEALTHY}{socket.gethostname()}-{pid}-{_BIRTH}-{slot}"


@app.on_configure.connect  # type: ignore[union-attr, untyped-decorator]
def _check(**_: Any) -> None:
    # The first thing that a worker does. Celery would read our settings next, and print a traceback of what is wrong.
    startup.check_or_exit()


@celeryd_init.connect  # type: ignore[untyped-decorator]
def _check_options(options: Mapping[str, Any], **_: Any) -> None:
    if why := pool.find_conflict(options):
        sys.exit(f"error: {why}")


@worker_init.connect  # type: ignore[untyped-decorator]
def _listen(sender: Any, **_: Any) -> None:
    # The command line has been read, and the processes are not forked yet: they all have one answer.
    sender.app.amqp.queues.select(devices.served_queues() or get_settings().queues())


@setup_logging.connect  # type: ignore[untyped-decorator]
def _logs(**_: Any) -> None:
    configure()
    for fault in catalogue.missing_sources():
        get_logger(__name__).error("a base model is not here; its jobs fail", fault=fault)


@worker_ready.connect  # type: ignore[untyped-decorator]
def _ready(**_: Any) -> None:
    settings, found = get_settings(), devices.list_gpus()
    log = get_logger(__name__)
    log.info("the worker is ready", slots=settings.worker_slots, device=devices.device(), gpus=found)
    left = sorted(set(settings.queues()) - set(devices.served_queues()))
    if devices.may_take_a_job(settings.worker_slots) and left:
        log.warning("jobs of these queues ask for another device and are not taken", queues=left)
    threading.Thread(target=_send_heartbeats, name="heartbeat", daemon=True).start()


@worker_process_init.connect  # type: ignore[untyped-decorator]
def _child(**_: Any) -> None:
    # A connection opened before the fork belongs to the parent, and so do the threads that watch for silence.
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


def _usable_slots() -> tuple[int, str | None]:
    """How many slots of this worker take jobs, and why not all."""
    slots, flags = get_settings().worker_slots, unhealthy_file(os.getpid(), "*")
    if why := devices.find_problem(slots):
        return 0, why
    resting = list[str]()
    for flag in flags.parent.glob(flags.name):
        with suppress(FileNotFoundError):  # it has just come back
            resting.append(flag.read_text())
    return max(0, slots - len(resting)), " ".join(dict.fromkeys(resting)) or None


def _send_heartbeats() -> None:
    log, me, started = get_logger(__name__), name(os.getpid()), datetime.now(UTC)
    while True:
        try:
            slots, problem = _usable_slots()
            with session_scope() as session:
                workers.record_heartbeat(
                    session, me, slots=slots, queues=devices.served_queues(), started_at=started, problem=problem
                )
                session.commit()
        except Exception as error:
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
