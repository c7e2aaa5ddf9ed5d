"""Names of cache entries. A name says whose rows an entry was made of, so that it is deleted with them.

`KEY.OWNER.SHA256[.SHA256].safetensors`: a digest of everything that the entry depends on, the owner of the rows, and
the SHA-256 of each file that they came from. Owners never share an entry, not even for equal files, because finding one
would reveal that somebody else has trained on these rows.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

SUFFIX = ".safetensors"
OF_ROWS = ("init", "tokens")  # folders whose entries come from rows, or have `NO_ROWS` in their names
KERNELS = "kernels"  # the folder for kernels that torch compiled; they contain nothing of any rows
NOBODY = "nobody"
NO_ROWS = "no-rows"
_NAME = re.compile(r"\.?[^.]+\.(?P<owner>[A-Za-z0-9_-]+)(?P<files>(?:\.[0-9a-f]{64})+)(?:\.safetensors|-[0-9a-f]+)")


@dataclass(frozen=True)
class SourceRows:
    """Where an entry's rows come from: their owner and the SHA-256 of their files."""

    owner: str
    files: tuple[str, ...]


def entry_name(key: str, *, owner: str | None, files: Sequence[str]) -> str:
    """The name of an entry, without its suffix. An entry that was made without rows is shared by all owners."""
    return ".".join([key, owner or NOBODY, *sorted(set(files))] if files else [key, NO_ROWS])


def is_without_rows(file_name: str) -> bool:
    """Whether a file's name says that it was made from the base alone. Temporary files of crashed writers count too."""
    return f".{NO_ROWS}{SUFFIX}" in file_name or f".{NO_ROWS}-" in file_name


def parse_rows(file_name: str) -> SourceRows | None:
    """The rows that a file's name mentions; None if it mentions none. Temporary files of crashed writers count too."""
    found = _NAME.fullmatch(file_name)
    return found and SourceRows(found["owner"], tuple(found["files"].split(".")[1:]))
