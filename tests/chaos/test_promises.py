"""docs/reliability.md promises nothing without a test, and each test that it names is there."""

import re

from tests.chaos.fleet import ROOT

PAGE = (ROOT / "docs" / "reliability.md").read_text()
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", PAGE)


def test_every_test_that_the_page_names_is_there() -> None:
    gone = [f"{path}::{name}" for path, name in NAMED if f"def {name}(" not in (ROOT / path).read_text()]
    assert gone == []


def test_every_promise_names_a_test() -> None:
    rows = re.findall(r"^\| (P?\d+) \| .*$", PAGE, re.MULTILINE)
    assert rows == [str(n) for n in range(1, 7)] + [f"P{n}" for n in range(1, 21)]
    bare = [line for line in PAGE.splitlines() if re.match(r"\| P?\d+ \|", line) and "tests/" not in line]
    assert bare == []
