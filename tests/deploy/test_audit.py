"""The dependency audit: what needs no network, and that it never mistakes silence for good news."""

import re
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.deploy import audit

ROOT = Path(__file__).parents[2]
PINS = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUNS = ("train", "quantized", "service", "api", "worker", "embedded")


def named(requirements: list[str]) -> set[str]:
    names = (re.match(r"[\w-]+", line) for line in requirements)
    return {match[0] for match in names if match} - {"lorainit"}


def test_every_package_the_service_runs_on_is_pinned() -> None:
    wanted = named(PROJECT["dependencies"]).union(*(named(PROJECT["optional-dependencies"][extra]) for extra in RUNS))
    assert wanted - set(PINS) == set()


@pytest.mark.parametrize("name", PINS)
def test_what_is_installed_is_what_is_pinned(name: str) -> None:
    assert version(name).partition("+")[0] == PINS[name]


def asked(tmp_path: Path, script: str, *arguments: str) -> int:
    path = tmp_path / "asked.py"
    path.write_text(script)
    return audit.main(arguments, program=(sys.executable, str(path)))


def test_no_known_hole_is_success(tmp_path: Path) -> None:
    assert asked(tmp_path, 'print(\'{"dependencies": [{"name": "a", "version": "1", "vulns": []}]}\')') == 0


def test_a_known_hole_fails_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hole = {"id": "CVE-1", "fix_versions": ["2"]}
    report = {"dependencies": [{"name": "a", "version": "1", "vulns": [hole]}]}
    script = f"import json; print(json.dumps({report!r})); raise SystemExit(1)"
    for option in ((), ("--or-skip",)):
        assert asked(tmp_path, script, *option) == 1
    assert "a 1: CVE-1, fixed in 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "script",
    ["raise SystemExit('no route to host')", "print('{\"dependencies\": []}')", "print('[]')", "print('{}')"],
)
def test_no_answer_is_said_loudly_and_is_no_success(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], script: str
) -> None:
    assert asked(tmp_path, script) == 2
    assert asked(tmp_path, script, "--or-skip") == 0
    said = capsys.readouterr()
    assert said.err.count("AUDIT SKIPPED") == 2 and "no known holes" not in said.out
