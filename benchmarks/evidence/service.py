"""The service that measures: `lorainit serve` on a state folder of its own, with a key of its own.

It ends with this process, however that ends. Started again on the same folder, it goes on with the jobs that ran.
"""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from openai import OpenAI, OpenAIError

from api.embedded.children import Child, read_tail

START_SECONDS = 600.0  # generous, because it may run at the lowest priority on a busy machine
# One job at a time, so that its seconds are its own. Checkpoints of ended jobs are of no use here and fill the disk. A
# worker that waits long for a processor must not be taken for a dead one. A job that is stopped often must not fail.
SETTINGS = {
    "WORKER_SLOTS": "1",
    "KEEP_CHECKPOINTS": "1",
    "CHECKPOINT_DAYS": "0.01",
    "LEASE_SECONDS": "300",
    "MAX_ATTEMPTS": "1000",
}


class NoService(Exception):
    """The service does not start; the message has the end of its log."""


class Service:
    """The running service. `connect` is called again and again, because a service that was restarted has a new port."""

    def __init__(self, state: Path, nice: int) -> None:
        self.state, self.nice = state.resolve(), nice
        self._environment = _make_environment(self.state)
        self._log = self.state / "logs" / "serve.log"
        command = [sys.executable, "-m", "api.cli", "serve", "--port", "0"]
        self._child = Child("service", command, self._environment, self._log, grace=60.0)

    def start(self) -> None:
        """Start it and wait until it answers and a worker reports.

        Raises:
            NoService: it does not come up.
        """
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self.state.chmod(0o700)
        self._make_key()
        (self.state / "service.json").unlink(missing_ok=True)  # of a service that was killed
        self._child.start()
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            self._restart()
            if time.monotonic() > deadline:
                raise NoService(f"The service does not start:\n{read_tail(self._log)}")
            time.sleep(1.0)

    def connect(self) -> OpenAI:
        """A client of the service at its present address.

        Raises:
            OSError: it has no address at the moment.
        """
        url = json.loads((self.state / "service.json").read_text())["url"]
        return OpenAI(base_url=url, api_key=self._key_file.read_text().strip())

    def keep_up(self) -> None:
        """Start it again if it has ended, and keep its processes at the wanted priority."""
        self._restart()
        lower_priority(self.nice)  # not before it is up, because it gives up if its start takes minutes

    def stop(self) -> None:
        """End it in order: a running job writes a checkpoint first."""
        self._child.stop()

    def _restart(self) -> None:
        if (news := self._child.restart_if_ended()) is not None:
            print(news, file=sys.stderr, flush=True)

    def _answers(self) -> bool:
        try:
            self.connect().models.list()
        except (OSError, ValueError, OpenAIError):
            return False
        return True

    @property
    def _key_file(self) -> Path:
        return self.state / "key"

    def _make_key(self) -> None:
        """A key of its own, once. It is made before the service, which would print the first key into its log."""
        self._lorainit("migrate")
        if self._key_file.exists() and self._key_file.read_text().strip():
            return
        self._key_file.touch(mode=0o600)
        self._key_file.write_text(self._lorainit("keys", "create", "--name", "evidence"))

    def _lorainit(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "api.cli", *arguments]
        done = subprocess.run(command, env=dict(self._environment), capture_output=True, text=True, check=False)
        if done.returncode:
            raise NoService(f"lorainit {' '.join(arguments)} failed: {done.stderr.strip()}")
        return done.stdout


def lower_priority(nice: int) -> None:
    """Give way to other programs of this machine, if `nice` is above 0.

    Linux shares the processor between sessions first (autogroups), and the parts of a service have sessions of their
    own. So a process's own niceness counts for nothing against other sessions, and each session's is set here.
    """
    for process in psutil.Process().children(recursive=True) if nice else ():
        group = Path(f"/proc/{process.pid}/autogroup")
        with suppress(OSError):  # it has ended, or this kernel has no autogroups
            if not group.read_text().rstrip().endswith(f"nice {nice}"):
                group.write_text(str(nice))


def _make_environment(state: Path) -> Mapping[str, str]:
    # The shell may be set up for other servers, which must not be used.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LORAINIT_", "OPENAI_"))}
    ours = {f"LORAINIT_{name}": value for name, value in SETTINGS.items()}
    return {**kept, **ours, "LORAINIT_STATE_DIR": str(state)}


@contextmanager
def run_service(state: Path, *, nice: int = 0) -> Iterator[Service]:
    """The service, up for the length of the block; `nice`: its priority beside other programs, 19 the lowest.

    Raises:
        NoService: it does not come up.
    """
    with _locked(state):
        service = Service(state, nice)
        try:
            service.start()
            yield service
        finally:
            service.stop()


@contextmanager
def _locked(state: Path) -> Iterator[None]:
    """Refuse a second measurement on the same folder. However this process ends, the lock ends with it."""
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (state / "evidence.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise NoService(
                f"A measurement with {state} is running already; stop it or give another --state."
            ) from error
        yield
