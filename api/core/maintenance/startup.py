"""What every process of the service sees to first: settings, catalogue, and that no other account reads its files."""

import os
import stat
import sys
from contextlib import suppress
from pathlib import Path

from api.core.models import catalogue
from api.core.models.catalogue_file import BadCatalogue
from api.core.settings import BadSettings, get_settings

OTHERS = stat.S_IRWXG | stat.S_IRWXO


class OpenFolder(Exception):
    """Other accounts of this machine can look into the state folder; the message says what to do."""


def check_or_exit() -> None:
    """End this process with one line and exit code 1 if something of that does not hold; what it writes is its own."""
    os.umask(OTHERS)
    try:
        settings = get_settings()
        if settings.state_dir.is_dir():
            make_private(settings.state_dir)
        catalogue.entries()
    except (BadSettings, BadCatalogue, OpenFolder) as error:
        sys.exit(f"error: {error}")


def make_private(folder: Path) -> None:
    """Make `folder` if there is none, and close it to other accounts: then whatever lies in it is closed, too.

    Where somebody else owns the folder, what lies in it is closed instead; what is made there later is, by our umask.

    Raises:
        OSError: it cannot be made.
        OpenFolder: others can look into it all the same.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_mode & stat.S_ISVTX:  # /tmp and the like: not ours to close
        left = [folder]
    elif _close(folder):
        return
    else:
        left = [path for path in folder.iterdir() if not (path.is_symlink() or _close(path))]
    if left:
        raise OpenFolder(
            f"other accounts of this machine can look into {left[0]}, and that cannot be changed; the state folder"
            f" holds training data and the database. Let its owner run 'chmod -R go= {folder}', or name a folder inside"
            " it as LORAINIT_STATE_DIR (--state): that one is made for this account alone."
        )


def _close(path: Path) -> bool:
    """Take the rights of other accounts away; False if they stay, since it is not ours or the disk keeps no modes."""
    with suppress(FileNotFoundError):  # removed just now
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & OTHERS:
            with suppress(OSError):
                path.chmod(mode & ~OTHERS)
        return not path.stat().st_mode & OTHERS
    return True
