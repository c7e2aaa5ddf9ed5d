"""The catalogue as a file: read whole, and what is wrong in it told with the file, the line and the field."""

import re
import tomllib
from collections.abc import Sequence
from importlib.resources.abc import Traversable
from typing import Any

from pydantic import ValidationError

_HEADER = re.compile(r"\s*\[\[\s*[\"']?models[\"']?\s*\]\]")


class BadCatalogue(ValueError):
    """The file of base models cannot be used; the message names it, the line and the field."""


def read(file: Traversable) -> str:
    """The file's text.

    Raises:
        BadCatalogue: there is none.
    """
    try:
        return file.read_text("utf-8")
    except OSError as error:
        raise BadCatalogue(f"The catalogue {file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise BadCatalogue(f"The catalogue {file} is not UTF-8 text: {error.reason} at byte {error.start}.") from error


def parse(text: str, file: Traversable) -> dict[str, Any]:
    """The file's tables.

    Raises:
        BadCatalogue: it is not TOML.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadCatalogue(f"The catalogue {file} is not TOML: {error}.") from error


def fault(error: ValidationError, text: str, file: Traversable) -> BadCatalogue:
    """The first of the faults that pydantic found."""
    faults = error.errors()
    loc, message = faults[0]["loc"], faults[0]["msg"].removeprefix("Value error, ")
    more = f" ({len(faults) - 1} more after this)" if len(faults) > 1 else ""
    return at(loc, f"{message[:1].lower()}{message[1:]}{more}", text, file)


def at(loc: Sequence[int | str], message: str, text: str, file: Traversable) -> BadCatalogue:
    """A fault at a place of the file, such as ("models", 0, "targets", 3, "name")."""
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")
    return BadCatalogue(f"The catalogue {file}, line {line_of(text, loc)}: {place}: {message}.")


def line_of(text: str, loc: Sequence[int | str]) -> int:
    """The line, from 1, of the nearest thing that the file has on the way to `loc`."""
    lines = text.splitlines()
    headers = [number for number, line in enumerate(lines) if _HEADER.match(line)]
    index = loc[1] if len(loc) > 1 and isinstance(loc[1], int) else 0
    if index >= len(headers):  # an array of inline tables, or no model at all
        return next((number for number, line in enumerate(lines, 1) if line.lstrip().startswith("models")), 1)
    start, end = headers[index], [*headers, len(lines)][index + 1]
    field = _first(lines, start + 1, end, rf"\s*{re.escape(str(loc[2]))}\s*=") if len(loc) > 2 else None
    if field is None:
        return start + 1
    rows = [number for number in range(field + 1, end) if lines[number].lstrip().startswith("{")]
    row = loc[3] if len(loc) > 3 and isinstance(loc[3], int) else len(rows)
    return (rows[row] if row < len(rows) else field) + 1


def _first(lines: list[str], start: int, end: int, pattern: str) -> int | None:
    return next((number for number in range(start, end) if re.match(pattern, lines[number])), None)
