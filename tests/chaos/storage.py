"""A storage folder that can really be full or read-only: a small file system of its own in a mount namespace.

Needs user namespaces, which most Linux systems have and some containers forbid.
"""

import os
import subprocess
import sys
from pathlib import Path

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
