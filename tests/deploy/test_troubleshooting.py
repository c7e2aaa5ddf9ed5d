"""docs/troubleshooting.md names every log line that asks for attention and every code that an operator can act on."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from api.core.jobs import pauses
from api.errors import CODES
from lorainit.config.errors import LorainitError
from worker.job import outcomes

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
LOUD = ("warning", "error", "exception")


def column(title: str, number: int = 0) -> list[str]:
    """What stands in backticks in a column of the table below a heading."""
    table = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    cells = [line.split(" | ")[number] for line in table.splitlines() if line.startswith("| `")]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def kinds(kind: type[LorainitError]) -> Iterator[str]:
    yield kind.code
    for below in kind.__subclasses__():
        yield from kinds(below)


def job_codes() -> set[str]:
    """What a job may fail with, as far as it stands in code."""
    said = set(kinds(LorainitError)) | set(pauses.RESUMABLE_ERRORS) | set(outcomes.RETRIED_CODES)
    for path in (ROOT / "worker").rglob("*.py"):
        said |= set(re.findall(r'Failure\(\s*"(\w+)"', path.read_text()))
    return said


def loud_lines() -> set[str]:
    """Every first argument of a call such as `log.warning`, in the service's own code."""
    found: set[str] = set()
    for path in [*(ROOT / "api").rglob("*.py"), *(ROOT / "worker").rglob("*.py")]:
        if path.is_relative_to(ROOT / "api" / "cli"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args and _is_loud(node.func):
                found |= set(_texts(node.args[0]))
    return found


def _is_loud(called: ast.expr) -> bool:
    """`log.warning(...)`, `get_logger(...).error(...)`, and `write_line(...)` where a line chose how loud it is."""
    if isinstance(called, ast.Name):
        return called.id == "write_line"
    return (
        isinstance(called, ast.Attribute)
        and called.attr in LOUD
        and re.search("log", ast.unparse(called.value)) is not None
    )


def _texts(value: ast.expr) -> Iterator[str]:
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        yield value.value
    elif isinstance(value, ast.IfExp):
        yield from _texts(value.body)
        yield from _texts(value.orelse)


def test_every_line_that_asks_for_attention_is_explained_and_no_other() -> None:
    assert sorted(column("Lines in the log")) == sorted(loud_lines())


def test_every_answer_that_is_the_operators_is_explained() -> None:
    said = column("Codes of answers")
    assert set(said) <= set(CODES)
    theirs = {code for code, statuses in CODES.items() if max(statuses) in (413, 429) or max(statuses) >= 500}
    assert theirs <= set(said)


def test_every_failure_that_may_pass_is_explained_and_no_code_is_made_up() -> None:
    said = set(column("Codes of failed jobs"))
    assert said <= job_codes()
    assert set(pauses.RESUMABLE_ERRORS) <= said
