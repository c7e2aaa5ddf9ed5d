"""The service under attack: servers and processes that come back when they fall, as under systemd.

Everything is started from the main thread, whose life the kernel ties the processes to.
"""

import http.client
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests import servers
from tests.chaos.proxy import Proxy
from tests.chaos.storage import Store

ROOT = Path(__file__).parents[2]
PAUSE = 0.3
LEASE_SECONDS = 3.0
WORKERS, SLOTS = 2, 2
CATALOGUE = """
[[models]]
id = "stub"
root = "tests/stub"
source = "/nowhere"
max_length = 256
chat = true
targets = [{ name = "q_proj", group = "attention", out_features = 32, in_features = 32, count = 2 }]
"""


@dataclass
class Kept:
    """A process that is started again whenever it has ended."""

    name: str
    command: list[str]
    start_at: float = 0.0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)


class Fleet:
    """A database, Valkey behind a proxy, the web process, a reconciler and two workers."""

    def __init__(
        self, place: Path, store: Store, *, mutant: str | None, catalogue: str = "", sqlite: bool = False
    ) -> None:
        self._exits = ExitStack()
        self.place, self.store = place, store
        for name in ("state", "logs", "steps", "held"):
            (place / name).mkdir()
        self.steps, self.held = place / "steps", place / "held"
        # A Unix socket's path may have 107 bytes at most, so these two get short folders of their own.
        self.postgres = None if sqlite else servers.Postgres(self._exits.enter_context(servers.folder()))
        if self.postgres is not None:
            self._exits.callback(self.postgres.stop)
        self.valkey = servers.Valkey(self._exits.enter_context(servers.folder()))
        self._exits.callback(lambda: self.valkey.stop())
        self.proxy = Proxy(self.valkey.port)
        self._exits.callback(self.proxy.close)
        self.database = (
            servers.new_database(self.postgres.url, "chaos") if self.postgres else f"sqlite:///{place}/chaos.db"
        )
        self.port = servers.free_port()
        (place / "catalogue.toml").write_text(CATALOGUE + catalogue)
        self.env = self._environment(mutant)
        celery = ["-m", "celery", "-A", "tests.chaos.worker_app", "worker", "-P", "prefork", "-c", str(SLOTS)]
        quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat", "-Q", "train"]
        self.kept = [Kept("api", ["-m", "api.server"]), Kept("reconciler", ["-m", "tests.chaos.reconciler"])]
        self.kept += [Kept(f"worker-{n}", [*celery, *quiet, "-n", f"w{n}@%h"]) for n in range(WORKERS)]

    @property
    def url(self) -> str:
        """Where the web process listens."""
        return f"http://127.0.0.1:{self.port}"

    def _environment(self, mutant: str | None) -> Mapping[str, str]:
        settings = {
            "STATE_DIR": self.place / "state",
            "DATABASE_URL": self.database,
            "BROKER_URL": f"redis://127.0.0.1:{self.proxy.port}/0",
            "CATALOGUE": self.place / "catalogue.toml",
            "HOST": "127.0.0.1",
            "PORT": self.port,
            "LEASE_SECONDS": LEASE_SECONDS,
            "BEAT_SECONDS": 0.3,
            "RECONCILE_SECONDS": 0.3,
            "WORKER_SLOTS": SLOTS,
            "DEVICES_PER_JOB": 2,
            "MIN_FREE_BYTES": 0,  # a full disk is part of the plan
            "RETRY_SECONDS": 0.1,
            "MAX_ATTEMPTS": 1000,  # every loss is ours: the run must end with each job done
        }
        kept = {name: value for name, value in os.environ.items() if not name.startswith("LORAINIT_")}
        ours = {"PYTHONPATH": str(ROOT), "CHAOS_MUTANT": mutant or ""}
        ours |= {"CHAOS_LOG": str(self.steps), "CHAOS_HELD": str(self.held)}
        threads = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        set_here = {f"LORAINIT_{name}": str(value) for name, value in settings.items()}
        return {**kept, **set_here, **self.store.settings, **ours, **threads}

    def set_up(self) -> str:
        """Tables, a project, and a key of it."""
        self._lorainit("migrate")
        return self._lorainit("keys", "create", "--project", "chaos").strip()

    def _lorainit(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "api.cli", *arguments]
        return subprocess.run(command, env=self.env, check=True, capture_output=True, text=True).stdout

    def is_up(self) -> bool:
        """The web process answers and says that it is ready."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def tend(self) -> None:
        """Start what has ended, a moment later."""
        for kept in self.kept:
            if kept.process is not None and kept.process.poll() is not None:
                kept.process, kept.start_at = None, time.monotonic() + PAUSE
            if kept.process is None and time.monotonic() >= kept.start_at:
                log = self.place / "logs" / kept.name
                kept.process = servers.spawn([sys.executable, *kept.command], log=log, env=self.env)

    def close(self) -> None:
        """Everything down, whatever state it is in."""
        for kept in self.kept:
            if kept.process is not None:
                for member in family(kept.process.pid):
                    with suppress(psutil.NoSuchProcess):
                        member.kill()
                kept.process.kill()
                kept.process.wait()
        self._exits.close()

    # --- what there is to attack -------------------------------------------------------------------

    def parents(self, name: str) -> list[psutil.Process]:
        """The processes started here whose name begins with `name`."""
        found = [kept.process for kept in self.kept if kept.name.startswith(name) and kept.process is not None]
        return [psutil.Process(one.pid) for one in found if one.poll() is None and psutil.pid_exists(one.pid)]

    def supervisors(self) -> list[psutil.Process]:
        """The pool processes of the workers."""
        return [child for parent in self.parents("worker") for child in family(parent.pid, recursive=False)]

    def trainers(self) -> list[psutil.Process]:
        """The training processes below the supervisors."""
        return [child for parent in self.supervisors() for child in family(parent.pid)]


def family(pid: int, *, recursive: bool = True) -> list[psutil.Process]:
    """The children of a process; none when it is gone."""
    try:
        return psutil.Process(pid).children(recursive=recursive)
    except psutil.NoSuchProcess:
        return []
