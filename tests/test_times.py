"""What `make test-times` makes of the record of a run, and that each slow test of docs/tests.md has its reason."""

import re

import pytest

from tests import times

RECORD = """<?xml version="1.0" encoding="utf-8"?><testsuites name="pytest tests">
<testsuite name="pytest" errors="0" failures="{failures}" skipped="0" tests="4" time="90.0"
 timestamp="2026-11-29T09:33:38.574415+00:00" hostname="vm">
<testcase classname="tests.api.test_a" name="test_x[sqlite]" time="20.5" />
<testcase classname="tests.test_b" name="test_y" time="0.4"><skipped /></testcase>
<testcase classname="tests.api.test_a" name="test_x[postgresql]" time="30.0" />
<testcase classname="tests.api.test_a" name="test_z" time="60.0" />
</testsuite></testsuites>"""
PAGE = times.PAGE.read_text()
LISTED = re.findall(r"^\| \d+ \| \d+ \| `([^`]+)` \| (.+) \|$", PAGE, re.MULTILINE)


def a_record() -> times.Record:
    return times.Record(RECORD.format(failures=0))


def test_cases_of_a_test_are_added_up_and_the_slowest_test_is_first() -> None:
    assert a_record().functions() == [
        times.Function("tests/api/test_a.py::test_z", 1, 60.0),
        times.Function("tests/api/test_a.py::test_x", 2, 50.5),
        times.Function("tests/test_b.py::test_y", 1, 0.4),
    ]


def test_files_of_less_than_a_second_are_not_kept() -> None:
    assert a_record().files() == {"tests/api/test_a.py": 110}


def test_a_run_in_which_a_test_failed_is_no_measure() -> None:
    with pytest.raises(ValueError, match="failed"):
        times.Record(RECORD.format(failures=1))


def test_a_run_of_some_files_is_no_measure() -> None:
    a_record().require_whole(["tests/api/test_a.py", "tests/test_b.py"])
    with pytest.raises(ValueError, match="not of all tests"):
        a_record().require_whole(["tests/api/test_a.py", "tests/test_b.py", "tests/test_c.py"])


def test_a_run_is_a_row_and_the_same_run_is_one_row() -> None:
    row = a_record().row()
    assert row == ["2026-11-29 09:33", "4", "1.5", "1.8"]
    page = f"<!-- runs -->\n{times.runs('', row)}\n<!-- /runs -->"
    assert times.runs(page, row) == times.runs("", row)
    later = ["2026-11-30 09:33", *row[1:]]
    assert times.runs(page, later).splitlines()[2:] == [f"| {' | '.join(one)} |" for one in (row, later)]


def test_a_slow_test_is_listed_with_its_reason_or_with_a_mark_that_it_has_none() -> None:
    lines = times.slowest(a_record().functions(), {"tests/api/test_a.py::test_x": "races"}).splitlines()
    assert lines[2] == "| 60 | 1 | `tests/api/test_a.py::test_z` | ? |"
    assert lines[3] == "| 50 | 2 | `tests/api/test_a.py::test_x` | races |"


def test_every_slow_test_of_the_page_has_its_reason() -> None:
    why = times.reasons()
    assert [(name, why.get(name)) for name, _ in LISTED] == LISTED, "write the reason in tests/reasons.toml"


def test_every_test_with_a_reason_exists() -> None:
    split = [name.split("::") for name in times.reasons()]
    gone = [
        (file, name)
        for file, name in split
        if not (times.ROOT / file).exists() or f"def {name}(" not in (times.ROOT / file).read_text()
    ]
    assert gone == []
