"""Where the service under attack keeps its files: a bucket that can be frozen, or a folder that can really be full.

A folder that is full or read-only is a small file system of its own in a mount namespace. That needs user namespaces,
which most Linux systems have and some containers forbid.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from api.core.files.storage import make_storage
from api.core.settings import Settings
from tests import servers

INSIDE = "CHAOS_INSIDE"
_NAMESPACE = ("unshare", "-Urm")
MEGABYTES = 1280  # four runs at once reserve 220 each, most of it for tokenizers they do not have


def enter() -> bool:
    """Go on as the same command in a namespace where file systems can be mounted; False when that is forbidden."""
    inside = os.environ.get(INSIDE) == "1"
    if not inside and subprocess.run([*_NAMESPACE, "true"], check=False, capture_output=True).returncode == 0:
        os.environ[INSIDE] = "1"
        os.execvp(_NAMESPACE[0], [*_NAMESPACE, sys.executable, "-m", "tests.chaos", *sys.argv[1:]])
    return inside


class Store(Protocol):
    """What the service is told of it, and what is in it."""

    @property
    def settings(self) -> Mapping[str, str]:
        """Environment variables that point at it."""

    def read(self, key: str) -> bytes | None:
        """The bytes under `key`, None when there are none."""


class Folder:
    """A folder of this host."""

    def __init__(self, path: Path) -> None:
        path.mkdir()
        self.path = path
        self.settings = {"LORAINIT_STORAGE_URL": path.as_uri()}

    def read(self, key: str) -> bytes | None:
        """What the file holds."""
        path = self.path / key
        return path.read_bytes() if path.exists() else None


class Bucket:
    """A bucket of a server of its own, whose `process` can be frozen."""

    def __init__(self, settings: Mapping[str, str], process: subprocess.Popen[bytes]) -> None:
        self.settings, self.process = settings, process
        named = {name.removeprefix("LORAINIT_").lower(): value for name, value in settings.items()}
        self._storage = make_storage(settings["LORAINIT_STORAGE_URL"], Settings.model_validate(named))

    @classmethod
    @contextmanager
    def served(cls) -> Iterator["Bucket"]:
        """One that is there as long as the context."""
        with servers.seaweed_process() as (settings, process):
            yield cls(settings, process)

    def read(self, key: str) -> bytes | None:
        """What the bucket has."""
        try:
            return b"".join(self._storage.read(key))
        except FileNotFoundError:
            return None


class SmallDisk:
    """A file system in memory at `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m", "chaos", str(folder)], check=True)

    def read_only(self, is_on: bool) -> None:
        """No byte can be written, or again. The system refuses while a file is being written: then not this time."""
        subprocess.run(["mount", "-o", f"remount,{'ro' if is_on else 'rw'}", str(self.folder)], check=not is_on)

    def fill(self) -> None:
        """Take every byte that is left."""
        with self._ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 20))
            except OSError:
                pass

    def drain(self) -> None:
        """Give the bytes back."""
        self._ballast.unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount."""
        subprocess.run(["umount", "-l", str(self.folder)], check=False, capture_output=True)
