"""The service on one machine, as one process tree: broker, reconciler, worker, API.

In production the same four programs run as separate containers. Here a parent starts them, restarts those that
crash, and stops all of them when it ends. All state is in one folder.
"""

import fcntl
import json
import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from api.core.access import keys
from api.core.db import migrate
from api.core.db.database import get_engine, session_scope
from api.core.db.tables import ApiKey
from api.core.maintenance import startup
from api.core.models import catalogue
from api.core.settings import Settings, find_unknown_variables, get_settings
from api.embedded import broker
from api.embedded.children import Child, follow, read_tail, size_of, sleeping

READY_SECONDS = 60.0  # generous, because a slow disk may need long to import the web framework
LOOK_SECONDS = 0.2  # between two checks whether the API is ready
TICK_SECONDS = 1.0  # between two reads of the logs; the end of a child wakes us earlier, by a signal
MAX_REASON = 500  # characters of a log line's error that are shown

Report = Callable[[str], None]


class CannotServe(Exception):
    """The service cannot start; the message says why and what to do."""


class Service:
    """The process tree: `start()`, then `watch()` until somebody asks to stop, then `stop()`."""

    def __init__(self, settings: Settings, *, report: Report) -> None:
        self.settings = settings
        self.state = settings.state_dir.resolve()
        self.report = report
        self.url = ""
        self.children: list[Child] = []
        self._asked_to_stop = False
        self._lock: IO[str] | None = None
        self._last_line = ("", "")  # the child and the text that were reported last
        self._socket: socket.socket | None = None

    def start(self) -> str | None:
        """Start everything and wait until it answers. Returns a first API key if the database had none.

        Raises:
            BadCatalogue: its file cannot be used.
            CannotServe: a base model is not here, the folder or port is taken, there is no broker, or a part does not
                come up.
        """
        _require_base_models(self.settings)
        for name in find_unknown_variables(os.environ):
            self.report(f"{name}: nothing reads it")
        _make_folder(self.state)
        self._lock = _lock(self.state)
        self._socket = _listen(self.settings.host, self.settings.port)
        self.url = _url(self.settings.host, self._socket)
        environment = self._environment()
        migrate.upgrade(get_engine())
        get_engine().dispose()
        python = sys.executable
        self._add("reconciler", [python, "-m", "worker.reconciler"], environment)
        celery = ["-m", "celery", "-A", "worker.app", "worker"]
        quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        self._add("worker", [python, *celery, *quiet], environment, grace=self.settings.stop_grace_seconds + 15.0)
        descriptor = self._socket.fileno()
        api = self._add("api", [python, "-m", "api.server", "--fd", str(descriptor)], environment, fds=(descriptor,))
        self._wait_until_ready(api)
        self._write_service_file()
        return _first_key()

    def watch(self) -> None:
        """Restart children that end, and report their important log lines, until somebody asks to stop."""
        logs = {child.name: follow(child.log, start=size_of(child.log)) for child in self.children}
        with sleeping() as sleep:
            while not self._asked_to_stop:
                self._restart_ended()
                for name, lines in logs.items():
                    for line in next(lines):
                        self.pass_on(name, line)
                sleep(min(TICK_SECONDS, *(child.seconds_to_start() for child in self.children)))

    def _restart_ended(self) -> None:
        """Restart children that have ended."""
        for child in self.children:
            pid = child.process and child.process.pid
            if (news := child.restart_if_ended()) is not None:
                self.report(news)
            if child.process and child.process.pid != pid:
                self._write_service_file()

    def ask_to_stop(self, _signal: int = 0, _frame: FrameType | None = None) -> None:
        """A signal handler: `watch()` ends. The second signal ends everything at once."""
        if self._asked_to_stop:
            os._exit(130)  # the children die with us
        self._asked_to_stop = True

    def stop(self) -> None:
        """Stop in order: no new requests, then the worker (its job goes back to the queue), then the rest."""
        if self._lock is None:
            return  # another service owns the folder, and its files must stay
        (self.state / "service.json").unlink(missing_ok=True)
        order = {"api": 0, "worker": 1, "reconciler": 2, "broker": 3}
        for child in sorted(self.children, key=lambda child: order[child.name]):
            child.stop()
        if self._socket is not None:
            self._socket.close()
        self._lock.close()

    def pass_on(self, name: str, line: str) -> None:
        """Report a child's log line if it is important and new: all children log the same about a bad catalogue."""
        text = _worth_showing(name, line)
        if text is None or (text == self._last_line[1] and name != self._last_line[0]):
            return
        self._last_line = (name, text)
        self.report(f"{name}: {text}")

    def _environment(self) -> Mapping[str, str]:
        ours = {"LORAINIT_STATE_DIR": str(self.state), "LORAINIT_BASE_MODELS_HERE": "true"}
        environment = {**os.environ, **ours, "PYTHONUNBUFFERED": "1"}
        if self.settings.broker_url is None:
            try:
                child, url = broker.start(
                    self.state / "broker", log=self.state / "logs" / "broker.log", environment=environment
                )
            except broker.BrokerMissing as error:
                raise CannotServe(str(error)) from error
            self.children.append(child)
            environment["LORAINIT_BROKER_URL"] = url
        return environment

    def _add(
        self,
        name: str,
        command: list[str],
        environment: Mapping[str, str],
        *,
        grace: float = 5.0,
        fds: tuple[int, ...] = (),
    ) -> Child:
        child = Child(name, command, environment, self.state / "logs" / f"{name}.log", pass_fds=fds, grace=grace)
        child.start()
        self.children.append(child)
        return child

    def _wait_until_ready(self, api: Child) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while (trouble := _trouble(f"{self.url}/readyz")) is not None:
            if self._asked_to_stop:
                raise CannotServe("stopped while starting")
            fallen = api.process is None or api.process.poll() is not None
            if fallen or time.monotonic() > deadline:
                why = "ended" if fallen else f"is not ready after {READY_SECONDS:.0f} s ({trouble})"
                raise CannotServe(f"the API {why}. The end of {api.log}:\n{read_tail(api.log)}")
            time.sleep(LOOK_SECONDS)

    def _write_service_file(self) -> None:
        pids = {child.name: child.process.pid for child in self.children if child.process}
        text = json.dumps({"url": f"{self.url}/v1", "pid": os.getpid(), "children": pids}, indent=2)
        # Written beside and then renamed, so that a reader never sees half a file.
        fresh = self.state / "service.json.new"
        fresh.write_text(text + "\n")
        fresh.replace(self.state / "service.json")


@contextmanager
def run_service(*, report: Report) -> Iterator[tuple[Service, str | None]]:
    """The service, up for the length of the block; SIGINT, SIGTERM and SIGHUP end it in order.

    Raises:
        CannotServe: see `Service.start`.
    """
    service = Service(get_settings(), report=report)
    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {kind: signal.signal(kind, service.ask_to_stop) for kind in kinds}
    mask = os.umask(startup.OTHERS)
    try:
        yield service, service.start()
    finally:
        service.stop()
        os.umask(mask)
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _require_base_models(settings: Settings) -> None:
    if not (missing := catalogue.find_missing_sources()):
        return
    where = f"The catalogue {settings.catalogue.absolute()}" if settings.catalogue else "The built-in catalogue"
    advice = "LORAINIT_CATALOGUE names a file of your own, and `lorainit models inspect` writes its entries."
    raise CannotServe(f"{where} offers what is not here: {' '.join(missing)} {advice}")


def _make_folder(state: Path) -> None:
    try:
        startup.make_private(state)
        (state / "logs").mkdir(exist_ok=True)
    except startup.OpenFolder as error:
        raise CannotServe(str(error)) from error
    except OSError as error:
        raise CannotServe(f"the state folder {state} cannot be made: {error.strerror}") from error


def _lock(state: Path) -> IO[str]:
    # The lock belongs to the open file, so it is released however this process ends.
    lock = (state / "serve.lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise CannotServe(f"another `lorainit serve` uses {state}; stop it or choose another --state") from error
    return lock


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    # Otherwise a restart within a minute would find the port still in use.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise CannotServe(f"cannot listen on {host}:{port} ({error.strerror}); choose another --port, or 0") from error
    listener.set_inheritable(True)
    return listener


def _url(host: str, listener: socket.socket) -> str:
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return f"http://{name}:{listener.getsockname()[1]}"


def _trouble(url: str) -> str | None:
    """What a readiness route reports as missing; None if nothing is."""
    try:
        with urllib.request.urlopen(url, timeout=5):  # noqa: S310  (our own http address)
            return None
    except urllib.error.HTTPError as error:
        checks = json.loads(error.read())["checks"]
        return ", ".join(
            f"{name}: {found}" for name, found in checks.items() if found in ("unreachable", "missing", "unknown")
        )
    except OSError as error:
        return str(error)


def _first_key() -> str | None:
    with session_scope() as session:
        if _has_key(session):
            return None
        project = keys.get_or_create_project(session, "default")
        _, secret = keys.create_key(session, project, name="first key", role="admin")
        session.commit()
        return secret


def _has_key(session: Session) -> bool:
    usable = select(func.count()).select_from(ApiKey).where(ApiKey.deleted_at.is_(None))
    return bool(session.scalar(usable))


def _worth_showing(name: str, line: str) -> str | None:
    """A log line to show, or None: warnings and errors with their reason, and the worker's lines about jobs."""
    try:
        record = json.loads(line)
        level, event = record["level"], record["event"]
    except (ValueError, KeyError, TypeError):
        return None
    job = record.get("job_id")
    if level not in ("warning", "error", "critical") and not (name == "worker" and job):
        return None
    why = " ".join(str(record.get("error") or record.get("reason") or "").split())[:MAX_REASON]
    return f"{event}{f' [{job}]' if job else ''}{f': {why}' if why else ''}"
