"""Folders as tar files that are byte-identical for equal contents."""

import hashlib
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Archive:
    """A finished tar: its path, size in bytes, and lower-case hex SHA-256."""

    path: Path
    size: int
    sha256: str


def pack(folder: Path, target: Path, *, mtime: int) -> Archive:
    """Write `folder`'s files into an uncompressed tar: sorted names, owner 0, one time.

    Links are refused, because we made none: one could lead to files of the host.

    Raises:
        ValueError: a link or a special file lies in the folder.
    """
    if folder.is_symlink():
        raise ValueError(f"{folder.name} is a link")
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise ValueError(f"{path.name} is neither a file nor a folder")
            if path.is_file():
                info = tarfile.TarInfo(path.relative_to(folder).as_posix())
                info.size, info.mtime, info.mode = path.stat().st_size, mtime, 0o644
                with open(path, "rb", opener=_no_link) as file:
                    tar.addfile(info, file)
    with target.open("rb") as file:
        return Archive(target, target.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _no_link(path: str, flags: int) -> int:
    """Open as asked; an OSError if the file has become a link since it was checked."""
    return os.open(path, flags | os.O_NOFOLLOW)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar that we made. Nothing may be written outside `folder`."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
