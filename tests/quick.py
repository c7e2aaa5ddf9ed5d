"""`make test-quick`: the tests of what differs from main, then a few of everything, in about a minute.

    python -m tests.quick [--base main] [--list]

A test belongs to `lorainit/data/formats/rows.py` if its file is named `test_rows.py` or `test_rows_....py`, or imports
it. An initialization method has its cases in the tests of all methods, too. After 45 seconds of tests no further one
begins, and what was left out is said. It replaces no `make test`.
"""

import argparse
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SECONDS = 45  # for tests; the rest of the minute is for starting pytest and importing what they need
# Each takes seconds: the life of a job, what is asked of the API, one method from spec to adapter, the documents.
CORE = (
    "tests/api/core/jobs/test_jobs.py",
    "tests/api/core/queue/test_groups.py",
    "tests/api/routes/test_job_lists.py",
    "tests/worker/job/test_progress.py",
    "tests/lorainit/init/methods/test_methods.py",
    "tests/lorainit/data/formats/test_rows.py",
    "tests/lorainit/test_imports.py",
    "tests/deploy/test_documents.py",
)
# What every method has to do. The battery comes last, because it trains an adapter for each of its cases.
OF_EVERY_METHOD = (
    "tests/lorainit/init/methods/test_methods.py",
    "tests/lorainit/test_identity.py",
    "tests/lorainit/test_dora.py",
    "tests/lorainit/test_battery.py",
)


@dataclass(frozen=True)
class Choice:
    """Tests of a file: those that have this word in their names, or all of them if it is empty."""

    file: str
    word: str = ""

    def has(self, nodeid: str) -> bool:
        """Whether a test belongs to it. `eva` is a word of `test_eva[llama-eva]`, and none of `test_evaluation`."""
        file, _, name = nodeid.partition("::")
        return file == self.file and bool(re.search(rf"(?<![a-z]){self.word}(?![a-z])", name))


def git(*arguments: str) -> list[str]:
    """The lines of what git says."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.splitlines()


def changed(base: str) -> list[str]:
    """Files that differ from where this branch left `base`, committed or not, new ones included."""
    if subprocess.run(["git", "rev-parse", "--quiet", "--verify", base], cwd=ROOT, capture_output=True).returncode:
        sys.exit(f"There is no branch or commit {base!r} here. Name another: make test-quick BASE=origin/main")
    (begin,) = git("merge-base", "HEAD", base)
    return [*git("diff", "--name-only", begin), *git("ls-files", "--others", "--exclude-standard")]


def test_files() -> dict[str, str]:
    """Every file of tests and its text."""
    return {str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / "tests").rglob("test_*.py"))}


def tests_of(file: str, among: dict[str, str]) -> Iterator[str]:
    """Tests that belong to a changed file: itself, then those by name, then those that import it."""
    package, _, name = file.removesuffix(".py").removesuffix("/__init__").rpartition("/")
    if not file.endswith(".py"):
        return
    module = package.replace("/", ".")
    imports = rf"(from|import) {re.escape(module)}\.{name}\b|from {re.escape(module)} import [^\n]*\b{name}\b"
    yield from (test for test in among if test == file)
    yield from (test for test in among if re.fullmatch(rf"test_{name}(_\w+)?\.py", Path(test).name))
    yield from (test for test, text in among.items() if re.search(imports, text))


def cases_of(file: str) -> Iterator[Choice]:
    """The cases of a changed initialization method in the tests of all methods; of what methods share, all cases."""
    if file == "lorainit/init/linalg.py":
        yield from map(Choice, OF_EVERY_METHOD)
    elif method := re.fullmatch(r"lorainit/init/methods/(\w+)\.py", file):
        yield from (Choice(test, method[1]) for test in OF_EVERY_METHOD)


def choose(files: Sequence[str], among: dict[str, str]) -> list[Choice]:
    """What runs for these changed files, in this order: their own tests, the cases of methods, a few of everything."""
    own = [Choice(test) for file in files for test in tests_of(file, among)]
    cases = [choice for file in files for choice in cases_of(file)]
    return list(dict.fromkeys([*own, *cases, *(Choice(file) for file in CORE)]))


class TimeLimit:
    """A plugin of pytest: the chosen tests in the order of `choices`, none of which begins when `seconds` are over."""

    def __init__(self, choices: Sequence[Choice], seconds: float) -> None:
        self._choices, self._seconds, self._deadline = choices, seconds, 0.0
        self.left = Counter[str]()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Choice after choice, where pytest would run all tests on one kind of database first."""
        chosen = {item.nodeid: item for choice in self._choices for item in items if choice.has(item.nodeid)}
        items[:] = chosen.values()

    def pytest_collection_finish(self) -> None:
        """The time begins: however long the imports took, some tests run."""
        self._deadline = time.monotonic() + self._seconds

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Leave a test out (True) once the time is over; else pytest runs it."""
        if time.monotonic() < self._deadline:
            return None
        self.left[file_of(item)] += 1
        return True

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say how many tests of which files were left out."""
        if self.left:
            terminalreporter.write_line(f"Not run, since {self._seconds} seconds were over:")
        for file, count in self.left.items():
            terminalreporter.write_line(f"  {file}: {count}")


def file_of(item: pytest.Item) -> str:
    """The path of its file from the repository's root."""
    return item.nodeid.partition("::")[0]


def main() -> int:
    """Choose, run, and say what was left out."""
    parser = argparse.ArgumentParser(prog="python -m tests.quick")
    parser.add_argument("--base", default="main", help="the branch or commit to compare with")
    parser.add_argument("--list", action="store_true", help="only say which files would run")
    options = parser.parse_args()
    choices = choose(changed(options.base), test_files())
    print(*(f"{choice.file} {choice.word}".rstrip() for choice in choices), sep="\n", flush=True)
    files = dict.fromkeys(choice.file for choice in choices)
    return 0 if options.list else pytest.main(["-q", *files], plugins=[TimeLimit(choices, SECONDS)])


if __name__ == "__main__":
    sys.exit(main())
