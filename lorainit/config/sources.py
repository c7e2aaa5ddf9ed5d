"""What the source and the root of a base model may be, and where a source lies. Torch-free, opens nothing.

A source is a folder, a `.gguf` file, `package:<python package>/<file>` or `hub:<owner>/<name>[@<revision>]`. A root
is the name that an adapter gives its base: readers look it up on a model hub, so it is a hub id, or one that no hub
can have.
"""

import errno
import importlib.util
import re
from pathlib import Path

from lorainit.config.errors import UnsupportedModel

PACKAGE, HUB, LOCAL = "package:", "hub:", "local:"
_NOTHING = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES)  # a path that leads nowhere, or nowhere for us
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"{_PART}/{_PART}", re.ASCII)
_HUB_SOURCE = re.compile(rf"(?:{HUB})?(?P<id>{_PART}/{_PART})(?:@(?P<revision>[^\s@]+))?", re.ASCII)


def is_hub_id(name: str) -> bool:
    """Whether a model hub could know this name, as `OWNER/NAME`."""
    return _HUB_ID.fullmatch(name) is not None and len(name) <= 96 and "--" not in name and ".." not in name


def as_hub_id(source: str) -> tuple[str, str | None] | None:
    """The id and the revision that `[hub:]OWNER/NAME[@REVISION]` names; None if it is nothing of that form."""
    found = _HUB_SOURCE.fullmatch(source)
    if found is None or not is_hub_id(found["id"]):
        return None
    return found["id"], found["revision"]


def is_root(name: str) -> bool:
    """Whether an adapter may call its base so: nobody else's model on a hub can have the name by accident."""
    return is_hub_id(name) or (name.startswith(LOCAL) and name != LOCAL)


def make_absolute(source: str, *, folder: Path) -> str:
    """A source that means the same from everywhere: paths are taken relative to `folder`.

    Raises:
        UnsupportedModel: as for `local_path`, of a path.
    """
    return source if source.startswith((PACKAGE, HUB)) else str(folder / _path(source))


def local_path(source: str) -> Path | None:
    """Where a source lies on this host, or would if it were there; None if it is on a hub.

    Raises:
        UnsupportedModel: a Python package that is not installed, the home folder of an unknown user, or no path at all.
    """
    if source.startswith(HUB):
        return None
    if source.startswith(PACKAGE):
        return _in_package(source.removeprefix(PACKAGE))
    return _path(source)


def exists(path: Path) -> bool:
    """Whether anything is there; a loop of links, a name too long or a zero byte in it is nothing.

    Raises:
        OSError: the host cannot tell: a disk that fails, for one.
    """
    try:
        return path.exists()
    except ValueError:
        return False
    except OSError as error:
        if error.errno in _NOTHING:
            return False
        raise


def _path(source: str) -> Path:
    if not source.strip():
        raise UnsupportedModel("The source of the base model is empty.", param="model")
    try:
        return Path(source).expanduser()
    except RuntimeError as error:
        user = source.partition("/")[0]
        raise UnsupportedModel(f"There is no home folder {user!r} on this host.", param="model") from error


def _in_package(name: str) -> Path:
    package, _, file = name.partition("/")
    try:  # finds a top-level package without importing it
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):  # what a running program has under this name is no package
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UnsupportedModel(f"The Python package {package!r} is not installed here.", param="model")
    return Path(spec.submodule_search_locations[0]) / file
