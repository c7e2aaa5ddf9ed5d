"""Reads the catalogue file, and reports its errors with file, line, model and field.

Neither the TOML parser nor pydantic knows the line of a value, so it is searched in the text.
"""

import re
import stat
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

MAX_BYTES = 16 << 20  # an entry with every layer named by its path has some 10 KB
_LONGEST_WORD = 80  # characters of the file's text in a message
_HEADER = re.compile(r"\s*\[\[\s*[\"']?models[\"']?\s*\]\]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

Location = Sequence[int | str]  # such as ("models", 0, "targets", 3, "name")


class BadCatalogue(ValueError):
    """The file of base models cannot be used; the message names it, the line, the model and the field."""


@dataclass(frozen=True)
class CatalogueFile:
    """The file's text, and the tables it holds."""

    file: Traversable
    text: str
    tables: dict[str, Any]

    def fault(self, error: ValidationError) -> BadCatalogue:
        """The first error that pydantic found. If a field is missing, an unknown key beside it is named, too."""
        faults = error.errors()
        location, message = faults[0]["loc"], faults[0]["msg"].removeprefix("Value error, ")
        more = f" ({len(faults) - 1} more after this)" if len(faults) > 1 else ""
        message = f"{message[:1].lower()}{message[1:]}"
        if wrong := _no_field_beside(faults):
            message += f", and {_short(wrong[-1])!r} is no field"
        return self.at(location, f"{message}{more}", line=find_line(self.text, wrong or location))

    def at(self, location: Location, message: str, *, line: int | None = None) -> BadCatalogue:
        """An error at this location of the file."""
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{_short(part)}" for part in location).lstrip(".")
        line = line or find_line(self.text, location)
        return BadCatalogue(f"The catalogue {self.file}, line {line}: {path}{self._whose(location)}: {message}.")

    def _whose(self, location: Location) -> str:
        try:
            name = self.tables["models"][location[1]]["id"]
        except (LookupError, TypeError):
            return ""
        return f" (model {_short(name)!r})" if isinstance(name, str) else ""


def read(file: Traversable) -> CatalogueFile:
    """The file.

    Raises:
        BadCatalogue: there is no such file, it is not TOML, or a text in it has control characters.
    """
    text = _text(file)
    try:
        found = CatalogueFile(file, text, tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise BadCatalogue(f"The catalogue {file} is not TOML: {error}.") from error
    except (RecursionError, ValueError) as error:  # nested too deep; a number of too many digits
        raise BadCatalogue(f"The catalogue {file} cannot be read as TOML: {error}.") from error
    for location, value in _strings(found.tables):
        if sign := _CONTROL.search(value):
            raise found.at(location, f"there is a control character in it, {sign[0]!r}")
    return found


def find_line(text: str, location: Location) -> int:
    """The line number, from 1, of `location`, or of the nearest key or table above it that the file has."""
    lines = text.splitlines()
    headers = [number for number, line in enumerate(lines) if _HEADER.match(line)]
    index = location[1] if len(location) > 1 and isinstance(location[1], int) else 0
    if index >= len(headers) or location[0] != "models":  # an array of inline tables, or no model at all
        found = _first(lines, 0, len(lines), rf"\s*\[*\s*[\"']?{re.escape(str(location[0]))}\b" if location else "")
        return 1 if found is None else found + 1
    start, end = headers[index], [*headers, len(lines)][index + 1]
    field = _first(lines, start + 1, end, rf"\s*{re.escape(str(location[2]))}\s*=") if len(location) > 2 else None
    if field is None:
        return start + 1
    rows = [number for number in range(field + 1, end) if lines[number].lstrip().startswith("{")]
    row = location[3] if len(location) > 3 and isinstance(location[3], int) else len(rows)
    return (rows[row] if row < len(rows) else field) + 1


def _text(file: Traversable) -> str:
    try:
        # Refused, because reading a pipe could wait for ever.
        if isinstance(file, Path) and not (stat.S_ISREG(file.stat().st_mode) or file.is_dir()):
            raise BadCatalogue(f"The catalogue {file} is not a plain file.")
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise BadCatalogue(f"The catalogue {file} has more than the {MAX_BYTES} bytes we would read.")
        return content.decode("utf-8-sig")  # editors on Windows begin a file with a byte-order mark
    except OSError as error:
        raise BadCatalogue(f"The catalogue {file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise BadCatalogue(f"The catalogue {file} is not UTF-8 text: {error.reason} at byte {error.start}.") from error


def _strings(value: Any, location: tuple[int | str, ...] = ()) -> Iterator[tuple[Location, str]]:
    """Every text of the file, and its location."""
    if isinstance(value, str):
        yield location, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _strings(item, (*location, key))


def _no_field_beside(faults: Sequence[Any]) -> Location | None:
    """The location of an unknown key, in the table in which the first error misses a field."""
    if faults[0]["type"] != "missing":
        return None
    beside = (fault["loc"] for fault in faults if fault["type"] == "extra_forbidden")
    return next((location for location in beside if location[:-1] == faults[0]["loc"][:-1]), None)


def _short(word: object) -> str:
    text = str(word)
    return text if len(text) <= _LONGEST_WORD else f"{text[:_LONGEST_WORD]}…"


def _first(lines: list[str], start: int, end: int, pattern: str) -> int | None:
    return next((number for number in range(start, end) if re.match(pattern, lines[number])), None)
