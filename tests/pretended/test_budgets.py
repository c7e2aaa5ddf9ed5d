"""What a run asks of a GPU only ever becomes less: budgets.json has today's counts, and nothing may be above them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pretended.budgets import CASES, MOMENTS, QUICK, Budget, accept, known, main

ROOT = Path(__file__).parents[2]
ROSE = (
    "A run asks more of a GPU than it did: {}. Make it as little as before; where it has to be more, write"
    " the new number into tests/pretended/budgets.json by hand, and say why in the commit."
)
FELL = (
    "A run asks less of a GPU than it did: {}. Keep it so: run `python -m tests.pretended.budgets --accept`,"
    " which writes the lower numbers, and commit tests/pretended/budgets.json."
)


def counted(*cases: str) -> dict[str, Budget]:
    """Of these cases, or of all, in a process of its own: its `lorainit` is not ours."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    called = [sys.executable, "-m", "tests.pretended.budgets", *cases]
    done = subprocess.run(called, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-2000:]
    found: dict[str, Budget] = json.loads(done.stdout.splitlines()[-1])
    return found


def hold(found: dict[str, Budget], kept: dict[str, Budget]) -> None:
    """Fail where a count is not the one that is kept, with what to do about it."""
    changes = [
        (value - kept[case][what], f"{what} of {case} from {kept[case][what]} to {value}")
        for case, budget in found.items()
        for what, value in budget.items()
    ]
    for sign, advice in ((1, ROSE), (-1, FELL)):
        said = "; ".join(text for change, text in changes if change * sign > 0)
        assert not said, advice.format(said)


def test_no_part_of_a_run_asks_more_of_a_gpu_than_it_did() -> None:
    found = counted(*QUICK)
    assert found.keys() == {*QUICK, *MOMENTS} - {"a step"}
    hold(found, known())


@pytest.mark.slow
def test_no_option_of_a_run_asks_more_of_a_gpu_than_it_did() -> None:
    found, kept = counted(), known()
    assert found.keys() == kept.keys()
    hold(found, kept)


def test_no_layer_makes_the_host_wait_or_sends_it_anything_but_into_a_checkpoint() -> None:
    kept = known()
    assert kept.keys() == {*CASES, *MOMENTS} - {"a step"}
    waiting = {case for case, budget in kept.items() if budget["waits a layer"] or budget["bytes across a layer"]}
    assert waiting == {"a checkpoint"}


def test_what_rose_is_named_and_never_accepted() -> None:
    kept, found = {"bf16": {"launches": 5, "waits": 2}}, {"bf16": {"launches": 6, "waits": 1}}
    with pytest.raises(AssertionError, match=r"asks more .* launches of bf16 from 5 to 6"):
        hold(found, kept)
    assert accept(found, kept) == {"bf16": {"launches": 5, "waits": 1}}
    with pytest.raises(AssertionError, match=r"asks less .* waits of bf16 from 2 to 1.* --accept"):
        hold({"bf16": {"launches": 5, "waits": 1}}, kept)


def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argument: str) -> tuple[object, str]:
    """The exit code of a command that counts nothing, and what it says."""
    monkeypatch.setattr(sys, "argv", ["budgets", argument])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    return ended.value.code, " ".join((said.out + said.err).split())


def test_the_counting_command_says_what_it_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = told(monkeypatch, capsys, "--help")
    assert code == 0
    assert "three adapters" in said


def test_the_counting_command_refuses_a_case_that_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = told(monkeypatch, capsys, "nonesuch")
    assert code == 2
    assert "there is no case 'nonesuch'" in said
