"""Names of cache entries: they say whose rows an entry was made of, so that it is deleted with them. Torch-free.

`KEY.OWNER.SHA256[.SHA256].safetensors`: all that shapes the entry as a digest, who the rows belong to, and the
SHA-256 of each file that they came from. Owners share nothing, not even the same bytes: an entry that is found says
that somebody has trained on these rows.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

SUFFIX = ".safetensors"
OF_ROWS = ("init", "tokens")  # folders whose entries are made of rows, or have a name that says they are not
KERNELS = "kernels"  # the folder in which torch keeps what it compiled, which is made of no rows
NOBODY = "nobody"
NO_ROWS = "no-rows"
_NAME = re.compile(r"\.?[^.]+\.(?P<owner>[A-Za-z0-9_-]+)(?P<files>(?:\.[0-9a-f]{64})+)(?:\.safetensors|-[0-9a-f]+)")


@dataclass(frozen=True)
class SourceRows:
    """The rows that an entry was made of: who owns them, and the SHA-256 of the files that they came from."""

    owner: str
    files: tuple[str, ...]


def entry_name(key: str, *, owner: str | None, files: Sequence[str]) -> str:
    """The name of an entry, without its suffix; one that was made of no rows belongs to everybody."""
    return ".".join([key, owner or NOBODY, *sorted(set(files))] if files else [key, NO_ROWS])


def is_without_rows(file_name: str) -> bool:
    """True of an entry, or of what a crashed writer left of one, that says it was made of the base alone."""
    return f".{NO_ROWS}{SUFFIX}" in file_name or f".{NO_ROWS}-" in file_name


def parse_rows(file_name: str) -> SourceRows | None:
    """What the name of an entry, or of what a crashed writer left of one, says; None where it says nothing of rows."""
    found = _NAME.fullmatch(file_name)
    return found and SourceRows(found["owner"], tuple(found["files"].split(".")[1:]))
