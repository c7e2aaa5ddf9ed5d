"""What the source and the root of a base model may be, and where a source is. Loads no torch and opens no file.

A source says where the base is: a folder, a `.gguf` file, `package:<python package>/<file>` or
`hub:<owner>/<name>[@<revision>]`. A root is the base's name inside an adapter. Loaders look this name up on a model
hub, so it must be a hub id, or a name that no hub can have; otherwise they might load a stranger's model.
"""

import errno
import importlib.util
import re
from pathlib import Path

from lorainit.config.errors import UnsupportedModel

PACKAGE, HUB, LOCAL = "package:", "hub:", "local:"
_NOTHING = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES)  # the path cannot exist, or we may not read it
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"{_PART}/{_PART}", re.ASCII)
_HUB_SOURCE = re.compile(rf"(?:{HUB})?(?P<id>{_PART}/{_PART})(?:@(?P<revision>[^\s@]+))?", re.ASCII)


def is_hub_id(name: str) -> bool:
    """Whether this name has the form of a hub id, `OWNER/NAME`."""
    return _HUB_ID.fullmatch(name) is not None and len(name) <= 96 and "--" not in name and ".." not in name


def as_hub_id(source: str) -> tuple[str, str | None] | None:
    """The id and the revision of `[hub:]OWNER/NAME[@REVISION]`; None if the source has another form."""
    found = _HUB_SOURCE.fullmatch(source)
    if found is None or not is_hub_id(found["id"]):
        return None
    return found["id"], found["revision"]


def is_root(name: str) -> bool:
    """Whether an adapter may use this name for its base: a hub id, or a name that no model on a hub can have."""
    return is_hub_id(name) or (name.startswith(LOCAL) and name != LOCAL)


def make_absolute(source: str, *, folder: Path) -> str:
    """The same source independent of the current folder: relative paths are taken relative to `folder`.

    Raises:
        UnsupportedModel: the path is empty, or names the home folder of an unknown user.
    """
    return source if source.startswith((PACKAGE, HUB)) else str(folder / _path(source))


def local_path(source: str) -> Path | None:
    """The path of a source on this host, whether anything is there or not; None for a source on a hub.

    Raises:
        UnsupportedModel: the Python package is not installed, the home folder's user is unknown, or the path is empty.
    """
    if source.startswith(HUB):
        return None
    if source.startswith(PACKAGE):
        return _in_package(source.removeprefix(PACKAGE))
    return _path(source)


def exists(path: Path) -> bool:
    """Whether the path exists. A loop of links, a name that is too long or a zero byte in it count as "no".

    Raises:
        OSError: the host cannot say, for example because a disk fails.
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
    except (ImportError, ValueError):  # `find_spec` raises for some loaded modules, `__main__` for one
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UnsupportedModel(f"The Python package {package!r} is not installed here.", param="model")
    return Path(spec.submodule_search_locations[0]) / file
