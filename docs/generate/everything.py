"""All generated files and sections, as one table of path and text."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import rates_page
from docs.generate import architecture, errors, methods, plots, settings
from docs.generate.drawings import DRAWINGS
from docs.generate.marks import put
from lorainit.config.inits import INITS

ROOT = Path(__file__).parents[2]
METHODS = ROOT / "docs" / "methods"
PICTURES = ROOT / "docs" / "pictures"

SECTIONS: list[tuple[str, str, Callable[[], str]]] = [
    ("README.md", "initializations", methods.overview),
    ("docs/architecture.md", "imports", architecture.imports),
    ("docs/architecture.md", "folders", architecture.folders),
    ("docs/settings.md", "settings", settings.settings),
    ("docs/errors.md", "answers", errors.of_answers),
    ("docs/errors.md", "jobs", errors.of_jobs),
    ("docs/errors.md", "rows", errors.of_rows),
    ("docs/errors.md", "warnings", errors.of_warnings),
    ("docs/rates.md", rates_page.TABLE, rates_page.table),
    ("docs/methods/README.md", "initializations", methods.index),
    ("docs/methods/README.md", "dora", methods.dora),
    *((f"docs/methods/{name}.md", "facts", partial(methods.facts, name)) for name in INITS),
]


def pages() -> dict[Path, str]:
    """Every page with a generated section, as it has to be.

    Raises:
        ValueError: a page has no place for its section.
    """
    found: dict[Path, str] = {}
    for name, section, text in SECTIONS:
        path = ROOT / name
        try:
            found[path] = put(found.get(path) or path.read_text(), section, text())
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return found


def pictures() -> dict[Path, str]:
    """Every picture."""
    drawn = {PICTURES / f"{name}.svg": draw().render() for name, draw in DRAWINGS.items()}
    return drawn | {PICTURES / "methods" / f"{name}.svg": plots.picture(name) for name in INITS}


def files() -> dict[Path, str]:
    """Pages and pictures. A picture that differs by rounding alone is left as it is."""
    return pages() | {path: text for path, text in pictures().items() if not same_picture(path, text)}


def new_pages() -> None:
    """Begin the page of a method that has none."""
    for name in INITS:
        if not (path := METHODS / f"{name}.md").exists():
            path.write_text(methods.page(name))


def same_picture(path: Path, text: str) -> bool:
    """Whether the file shows the same: equal words, and numbers that differ by less than a quarter of a pixel."""
    return path.exists() and _numbers_apart(path.read_text(), text) < 0.25


def _numbers_apart(one: str, other: str) -> float:
    split = [re.split(r"(-?\d+(?:\.\d+)?)", text) for text in (one, other)]
    if split[0][::2] != split[1][::2]:
        return float("inf")
    return max((abs(float(a) - float(b)) for a, b in zip(split[0][1::2], split[1][1::2], strict=True)), default=0.0)
