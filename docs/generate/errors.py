"""docs/errors.md: every code that an answer, a job, a row or a warning can carry.

The codes and statuses are the code's. What each means is written here, because no single line of the code says it;
a code without a meaning, or a meaning without a code, ends `make docs` with its name.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import get_args

from api.core.jobs.pauses import RESUMABLE_ERRORS
from api.errors import CODES
from docs.generate import meanings
from docs.generate.marks import table
from lorainit.config.errors import Dropped, LorainitError, Stopped
from lorainit.config.events import Warned

ROOT = Path(__file__).parents[2]


def of_answers() -> str:
    """Codes of refused requests, with the statuses that they come with."""
    _require(CODES, meanings.ANSWERS)
    rows = [[f"`{code}`", ", ".join(map(str, status)), meanings.ANSWERS[code]] for code, status in CODES.items()]
    return table(["code", "status", "what it means"], rows)


def of_jobs() -> str:
    """Codes of failed jobs, and whether the job can be resumed."""
    codes = dict.fromkeys(kind.code for kind in _kinds(LorainitError) if kind not in (Dropped, Stopped))
    _require(codes, meanings.JOBS)
    rows = [[f"`{code}`", "yes" if code in RESUMABLE_ERRORS else "no", meanings.JOBS[code]] for code in sorted(codes)]
    return table(["code", "can be resumed", "what it means, and what helps"], rows)


def of_rows() -> str:
    """Codes of rows and files that cannot be used, and of warnings about them."""
    codes = dict.fromkeys(sorted(_row_codes()))
    _require(codes, meanings.ROWS)
    return table(["code", "what it means"], [[f"`{code}`", meanings.ROWS[code]] for code in codes])


def of_warnings() -> str:
    """Codes in the `warnings` of a job that succeeded."""
    codes = dict.fromkeys(get_args(Warned.model_fields["code"].annotation))
    _require(codes, meanings.WARNINGS)
    return table(["code", "what it means"], [[f"`{code}`", meanings.WARNINGS[code]] for code in codes])


def _require(codes: Mapping[str, object], words: Mapping[str, str]) -> None:
    """Raise `ValueError` with the names of codes without a meaning, and of meanings without a code."""
    if missing := codes.keys() - words.keys():
        raise ValueError(f"docs/generate/meanings.py does not say what these codes mean: {sorted(missing)}")
    if gone := words.keys() - codes.keys():
        raise ValueError(f"docs/generate/meanings.py has meanings of codes that no longer exist: {sorted(gone)}")


def _kinds(kind: type[LorainitError]) -> Iterator[type[LorainitError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _kinds(below)


def _row_codes() -> Iterator[str]:
    """The codes that `lorainit` gives to faults of rows: the first argument of the calls that make one, or `code=`."""
    for path in (ROOT / "lorainit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Fault", "Problem", "Unreadable"):
                yield from _literals([*node.args[:1], *(key.value for key in node.keywords if key.arg == "code")])


def _literals(values: list[ast.expr]) -> Iterator[str]:
    for value in values:
        for node in ast.walk(value):
            if isinstance(node, ast.Constant) and re.fullmatch("[a-z0-9_]+", str(node.value)):
                yield str(node.value)
