"""In how many processes `make test` runs and in which order, and what `make test-quick` chooses."""

import subprocess
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import quick, side_by_side
from tests.quick import Choice

GIB = 1 << 30
AMONG = {
    "tests/core/test_jobs.py": "from api.core import jobs\n",
    "tests/core/test_lines.py": "from api.core import catalogue, jobs\nfrom lorainit.rows import check_file\n",
    "tests/lorainit/test_rows.py": "",
    "tests/lorainit/test_rows_of_tools.py": "",
    "tests/lorainit/test_rowsets.py": "from api.core import jobs_of_tests\n",
}


@pytest.mark.parametrize(
    ("cores", "free", "count"),
    [(2, 64 * GIB, 3), (16, 9 * GIB, 2), (15, 64 * GIB, 16), (4, 1 * GIB, 1), (3, None, 4)],
)
def test_there_is_one_process_more_than_cores_where_memory_allows(cores: int, free: int | None, count: int) -> None:
    assert side_by_side.processes(cores, free) == count


def items(*names: str) -> list[Any]:
    return [SimpleNamespace(nodeid=f"{one[0]}.py::{one}") for one in names]


def order_of(found: list[Any]) -> list[str]:
    return [item.nodeid.rpartition(":")[2] for item in found]


def test_files_are_handed_out_longest_first_and_a_new_one_last() -> None:
    found = items("a1", "b1", "n1", "a2", "b2")
    side_by_side.sort_longest_first(found, {"a.py": 1, "b.py": 70})
    assert order_of(found) == ["b1", "b2", "a1", "a2", "n1"]


def test_files_that_share_a_service_stay_together_and_count_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "TOGETHER", ("a/",))
    found = [SimpleNamespace(nodeid=nodeid) for nodeid in ("b.py::1", "c.py::1", "a/1.py::1", "a/2.py::1", "a/1.py::2")]
    side_by_side.sort_longest_first(found, {"a/1.py": 2, "b.py": 3, "a/2.py": 2})  # type: ignore[arg-type]
    assert [item.nodeid for item in found] == ["a/1.py::1", "a/2.py::1", "a/1.py::2", "b.py::1", "c.py::1"]
    assert [side_by_side.unit_of(nodeid) for nodeid in ("a/1.py::1", "a/2.py::1", "b.py::1")] == ["a/", "a/", "b.py"]


def test_folders_that_stay_together_exist() -> None:
    assert [folder for folder in side_by_side.TOGETHER if not (quick.ROOT / folder).is_dir()] == []


def test_one_process_keeps_the_order_of_pytest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "seconds.json").write_text('{"b.py": 70}')
    monkeypatch.setattr(side_by_side, "SECONDS", tmp_path / "seconds.json")
    alone, beside = SimpleNamespace(), SimpleNamespace(workerinput={})
    for config, order in ((alone, ["a1", "b1"]), (beside, ["b1", "a1"])):
        found = items("a1", "b1")
        side_by_side.pytest_collection_modifyitems(config, found)  # type: ignore[arg-type]
        assert order_of(found) == order


@pytest.mark.parametrize(
    ("file", "tests"),
    [
        ("lorainit/rows.py", ["lorainit/test_rows.py", "lorainit/test_rows_of_tools.py", "core/test_lines.py"]),
        ("api/core/jobs.py", ["core/test_jobs.py", "core/test_jobs.py", "core/test_lines.py"]),
        ("tests/core/test_lines.py", ["core/test_lines.py"]),
        ("docs/jobs.md", []),
    ],
)
def test_tests_belong_to_a_file_by_name_or_because_they_import_it(file: str, tests: list[str]) -> None:
    assert list(quick.tests_of(file, AMONG)) == [f"tests/{test}" for test in tests]


def test_files_that_every_quick_run_or_every_method_names_exist() -> None:
    assert [file for file in (*quick.CORE, *quick.OF_EVERY_METHOD) if not (quick.ROOT / file).exists()] == []


def test_a_method_that_changed_has_its_cases_in_the_tests_of_all_methods() -> None:
    cases = [Choice(file, "eva") for file in quick.OF_EVERY_METHOD]
    own = {"tests/test_eva.py": ""}
    wanted = [Choice("tests/test_eva.py"), *cases, *map(Choice, quick.CORE)]
    assert quick.choose(["lorainit/init/methods/eva.py"], own) == wanted


def test_what_methods_share_has_all_cases_of_those_tests() -> None:
    assert list(quick.cases_of("lorainit/init/linalg.py")) == [*map(Choice, quick.OF_EVERY_METHOD)]


@pytest.mark.parametrize(
    ("name", "has"),
    [("test_start[llama-eva+dora]", True), ("test_eva_counts", True), ("test_evaluation[pissa]", False)],
)
def test_a_choice_has_the_tests_of_its_file_that_name_its_word(name: str, has: bool) -> None:
    assert Choice("a.py", "eva").has(f"a.py::{name}") == has
    assert not Choice("b.py", "eva").has(f"a.py::{name}")


def test_a_quick_run_takes_choice_after_choice_and_only_what_was_chosen() -> None:
    found = items("a1", "b1", "a2", "b2", "c1")
    quick.TimeLimit([Choice("a.py", "a2"), Choice("b.py"), Choice("a.py")], inf).pytest_collection_modifyitems(found)
    assert order_of(found) == ["a2", "b1", "b2", "a1"]


@pytest.mark.parametrize(("seconds", "left"), [(inf, {}), (0, {"a.py": 2})])
def test_a_quick_run_begins_no_test_after_its_time_and_counts_what_it_left(
    seconds: float, left: dict[str, int]
) -> None:
    limit, item = quick.TimeLimit([Choice("a.py")], seconds), SimpleNamespace(nodeid="a.py::test")
    limit.pytest_collection_finish()
    is_left = [limit.pytest_runtest_protocol(item) for _ in range(2)]  # type: ignore[arg-type]
    assert (is_left, limit.left) == ([bool(left) or None] * 2, left)


def test_what_is_committed_changed_or_new_on_a_branch_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *words], cwd=tmp_path, check=True)

    monkeypatch.setattr(quick, "ROOT", tmp_path)
    git("init", "--quiet", "--initial-branch", "main")
    for name in ("old.py", "touched.py"):
        (tmp_path / name).write_text("")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    git("switch", "--quiet", "--create", "branch")
    (tmp_path / "committed.py").write_text("")
    git("add", ".")
    git("commit", "--quiet", "--message", "second")
    (tmp_path / "touched.py").write_text("x = 1\n")
    (tmp_path / "new.py").write_text("")
    assert sorted(quick.changed("main")) == ["committed.py", "new.py", "touched.py"]
