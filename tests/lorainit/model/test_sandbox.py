"""Inspection in a child process: whatever a model's files do to their reader, the answer is a sentence."""

import json
import sys
from pathlib import Path

import pytest

from lorainit.config.errors import UnsupportedModel
from lorainit.model import sandbox

SAY = "import os, json; os.write(1, json.dumps({}).encode() + b'\\n')"


def ask(code: str) -> dict[str, object]:
    return sandbox._run_child([sys.executable, "-c", code])


def test_facts_of_the_child_are_the_answer() -> None:
    code = SAY.format({"bytes": 5}) + "; " + SAY.format({"facts": {"root": "x"}})
    assert ask(code) == {"root": "x"}


def test_reason_of_the_child_is_the_reason() -> None:
    with pytest.raises(UnsupportedModel, match=r"^It is a BERT\.$"):
        ask(SAY.format({"message": "It is a BERT."}))


def test_child_that_crashes_is_a_refusal() -> None:
    with pytest.raises(UnsupportedModel, match="reading it ended with signal SIGSEGV"):
        ask("import os; os.kill(os.getpid(), 11)")


def test_child_that_gives_up_is_a_refusal_with_its_last_line() -> None:
    with pytest.raises(UnsupportedModel, match=r"exit code 1 \(ValueError: odd\)"):
        ask("raise ValueError('odd')")


@pytest.mark.parametrize("busy", ["while True: pass", "10 ** 10 ** 9", "import time; time.sleep(600)"])
def test_child_that_does_not_end_is_ended(busy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 1.0)
    with pytest.raises(UnsupportedModel, match="reading it took more than 1 s"):
        ask(SAY.format({"bytes": 0}) + "\n" + busy)


def test_child_that_writes_without_end_is_no_burden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 1.0)
    with pytest.raises(UnsupportedModel, match="took more than"):
        ask("import sys\nwhile True: sys.stderr.write('x' * 65536)")


def test_memory_beyond_the_bound_is_not_to_be_had() -> None:
    code = "from lorainit.system import limits\nlimits.bound_memory(1 << 28)\nbytearray(1 << 30)"
    with pytest.raises(UnsupportedModel, match="MemoryError"):
        ask(code)


@pytest.mark.slow  # it loads torch
def test_model_that_takes_all_memory_is_refused_with_the_bound(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nfrom lorainit.model import sandbox\nimport lorainit.model.inspect as inspecting\n"
        "inspecting.inspect = lambda *a, **k: bytearray(9 << 30)\n"
        f"sandbox.inspect_for_parent({json.dumps(str(tmp_path))}, Path('.'))"
    )
    with pytest.raises(UnsupportedModel, match="reading it takes more than 8 GiB"):
        ask(code)
