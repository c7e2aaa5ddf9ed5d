"""What every process checks first: its settings, its catalogue, and that no other account can read its files."""

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
    """Check them, and end this process with one line and exit code 1 if one is wrong. Makes new files private."""
    os.umask(OTHERS)  # first, so that no file is readable by others even for a moment
    try:
        settings = get_settings()
        if settings.state_dir.is_dir():
            make_private(settings.state_dir)
        catalogue.get_entries()
    except (BadSettings, BadCatalogue, OpenFolder) as error:
        sys.exit(f"error: {error}")


def make_private(folder: Path) -> None:
    """Make `folder` if there is none, and close it to other accounts, which closes everything in it.

    If somebody else owns the folder, the files in it are closed instead. Later ones are closed by our umask.

    Raises:
        OSError: it cannot be made.
        OpenFolder: others can still look into it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_mode & stat.S_ISVTX:  # a folder like /tmp, which other accounts need
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
    """Remove the rights of other accounts. False if that fails, because we do not own it or the disk has no modes."""
    with suppress(FileNotFoundError):  # another process has just removed it
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & OTHERS:
            with suppress(OSError):
                path.chmod(mode & ~OTHERS)
        return not path.stat().st_mode & OTHERS
    return True
