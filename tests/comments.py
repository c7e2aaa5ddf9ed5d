"""Counts the sentences in comments and docstrings that give a reason.

    python -m tests.comments [FOLDER ...]

A sentence gives a reason if a word of `REASON` is in it. That is a rough measure: a reason after a colon is not
counted, and a "since" that means time is. So it is a figure to look at, and no test demands one.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

FOLDERS = ("api", "worker", "lorainit")
REASON = re.compile(
    r"\b(because|since|so that|otherwise|else|therefore|hence|reasons?|why|due to|to avoid|in order to|would)\b|^So\b",
    re.IGNORECASE,
)
_DIRECTIVE = re.compile(r"#\s*(noqa|type:|fmt:|ruff:|!)")
_SENTENCE_END = re.compile(r"(?<=[.?!])\s+(?=[A-Z`\"(])|\n\s*\n")


class Counts(NamedTuple):
    """Lines that are not blank, sentences in comments and docstrings, and how many of these give a reason."""

    lines: int
    sentences: int
    reasons: int

    @property
    def percent(self) -> float:
        """Reasons for a hundred lines."""
        return 100 * self.reasons / self.lines if self.lines else 0.0


def count(source: str) -> Counts:
    """The counts of one Python file."""
    sentences = [sentence for text in _texts(source) for sentence in _SENTENCE_END.split(text) if sentence.strip()]
    lines = sum(bool(line.strip()) for line in source.splitlines())
    return Counts(lines, len(sentences), sum(REASON.search(sentence.strip()) is not None for sentence in sentences))


def count_all(paths: Iterable[Path]) -> Counts:
    """The sums over these files."""
    found = [count(path.read_text()) for path in paths]
    return Counts(*(sum(column) for column in zip(*found, strict=True))) if found else Counts(0, 0, 0)


def _texts(source: str) -> Iterator[str]:
    """Docstrings, and comments; those that follow each other on lines of their own are one text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
    block, last = "", 0
    for kind, text, (row, _), _, line in tokenize.generate_tokens(io.StringIO(source).readline):
        if kind != tokenize.COMMENT or _DIRECTIVE.match(text):
            continue
        if row != last + 1 or not line.lstrip().startswith("#"):
            yield block
            block = ""
        block, last = f"{block} {text.lstrip('# ')}", row
    yield block


def main() -> None:
    """Print a line for each folder."""
    print(f"{'folder':<28} {'lines':>7} {'sentences':>10} {'reasons':>8} {'% of lines':>11}")
    for folder in sys.argv[1:] or FOLDERS:
        found = count_all(sorted(Path(folder).rglob("*.py")))
        print(f"{folder:<28} {found.lines:>7} {found.sentences:>10} {found.reasons:>8} {found.percent:>11.1f}")


if __name__ == "__main__":
    main()
