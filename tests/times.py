"""`make test-times`: what the last whole `make test` took, out of the record that it left.

    python -m tests.times [--record .test-times.xml]

Writes the seconds of each file into tests/seconds.json, by which long files begin first, and into docs/tests.md a row
for the run and the slowest tests with the reason for each (tests/reasons.toml). Exit code 1 while a reason is missing.
"""

import argparse
import json
import sys
import tomllib
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from docs.generate.marks import put, table
from tests import quick
from tests.side_by_side import SECONDS

ROOT = Path(__file__).parents[1]
RECORD, PAGE, REASONS = ROOT / ".test-times.xml", ROOT / "docs" / "tests.md", ROOT / "tests" / "reasons.toml"
LISTED = 20  # slowest tests in the page
KEPT = 6  # whole runs in the page
MISSING = "?"
RUN_COLUMNS = ["began", "tests", "minutes", "minutes of all tests, one after another"]
SLOWEST_COLUMNS = ["seconds", "cases", "test", "why it is worth it"]


@dataclass(frozen=True)
class Function:
    """A test with all its cases; `seconds` holds those of fixtures that were made for it first."""

    name: str  # tests/test_a.py::test_b
    cases: int
    seconds: float


class Record:
    """What pytest wrote of a run (`--junitxml`).

    Raises:
        ValueError: some test failed, so that its seconds say nothing, or many files are missing.
    """

    def __init__(self, text: str) -> None:
        (suite,) = ElementTree.fromstring(text).iter("testsuite")
        if int(suite.attrib["failures"]) + int(suite.attrib["errors"]):
            raise ValueError("a test of the recorded run failed: run `make test` again")
        self.began, self.seconds = suite.attrib["timestamp"][:16].replace("T", " "), float(suite.attrib["time"])
        self._cases = [(_function(case), float(case.attrib["time"])) for case in suite.iter("testcase")]

    def require_whole(self, files: Collection[str]) -> None:
        """Refuse a run of some files only, or one that was interrupted. A few files hold nothing but slow tests."""
        recorded = {name.partition("::")[0] for name, _ in self._cases}
        if len(recorded & set(files)) < 0.9 * len(files):
            raise ValueError("the recorded run was not of all tests: run `make test` again")

    def functions(self) -> list[Function]:
        """The slowest first."""
        found = defaultdict[str, list[float]](list)
        for name, seconds in self._cases:
            found[name].append(seconds)
        made = [Function(name, len(cases), sum(cases)) for name, cases in found.items()]
        return sorted(made, key=lambda one: -one.seconds)

    def files(self) -> dict[str, int]:
        """Seconds of each file that takes one or more, the slowest first."""
        found = defaultdict[str, float](float)
        for name, seconds in self._cases:
            found[name.partition("::")[0]] += seconds
        return {name: round(found[name]) for name in sorted(found, key=lambda one: -found[one]) if found[name] >= 1}

    def row(self) -> list[str]:
        """The run as a row of the page."""
        apart = sum(seconds for _, seconds in self._cases)
        return [self.began, str(len(self._cases)), f"{self.seconds / 60:.1f}", f"{apart / 60:.1f}"]


def _function(case: ElementTree.Element) -> str:
    name = case.attrib["name"].partition("[")[0]
    return f"{case.attrib['classname'].replace('.', '/')}.py::{name}"


def reasons() -> dict[str, str]:
    """By test, as `tests/test_a.py::test_b`."""
    files = tomllib.loads(REASONS.read_text())
    return {f"{file}::{name}": reason for file, of in files.items() for name, reason in of.items()}


def slowest(functions: list[Function], why: Mapping[str, str]) -> str:
    """The table of the slowest tests."""
    rows = [
        [f"{one.seconds:.0f}", str(one.cases), f"`{one.name}`", why.get(one.name, MISSING)]
        for one in functions[:LISTED]
    ]
    return table(SLOWEST_COLUMNS, rows)


def runs(page: str, row: list[str]) -> str:
    """The table of whole runs with one more, the newest last."""
    _, _, rest = page.partition("<!-- runs -->")
    lines = [line for line in rest.partition("<!-- /runs -->")[0].splitlines() if line.startswith("| 2")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return table(RUN_COLUMNS, [*(one for one in rows if one[0] != row[0]), row][-KEPT:])


def main() -> int:
    """Read the record and write."""
    parser = argparse.ArgumentParser(prog="python -m tests.times")
    parser.add_argument("--record", type=Path, default=RECORD, help="what `pytest --junitxml` wrote of a whole run")
    record = Record(parser.parse_args().record.read_text())
    record.require_whole(quick.test_files().keys())
    page, functions, why = PAGE.read_text(), record.functions(), reasons()
    SECONDS.write_text(json.dumps(record.files(), indent=1) + "\n")
    PAGE.write_text(put(put(page, "runs", runs(page, record.row())), "slowest", slowest(functions, why)))
    missing = [one.name for one in functions[:LISTED] if one.name not in why]
    for name in missing:
        print(f"{name} has no reason in {REASONS.relative_to(ROOT)}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
