"""A program that is asked gets so much time, and neither it nor what it started stays behind."""

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import sleep

import psutil
import pytest

from lorainit.system.bounded_command import CommandResult, run_command


def python(script: str) -> list[str]:
    return [sys.executable, "-c", script]


class Clock:
    """What `run_command` needs of the module `time`."""

    sleep = staticmethod(sleep)

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self.monotonic = monotonic


def wait_until_gone(pid: int) -> None:
    with suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            sleep(0.05)


def test_an_answer_is_what_the_program_wrote_and_its_exit_code() -> None:
    script = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    assert run_command(python(script), seconds=600) == CommandResult(3, "out\n", "err\n")


def test_more_than_a_pipe_holds_is_read_whole() -> None:
    answer = run_command(python("print('x' * 1_000_000)"), seconds=600)
    assert answer is not None
    assert len(answer.output) == 1_000_001


def test_it_finds_the_environment_that_it_was_given() -> None:
    answer = run_command(python("import os; print(os.environ['X'])"), seconds=600, environment={"X": "7"})
    assert answer is not None
    assert answer.output == "7\n"


@pytest.mark.parametrize("how", ["out of time", "unwanted"])
def test_a_program_that_does_not_answer_is_killed_with_what_it_started(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time is stopped until it has started something, so that a busy machine changes nothing."""
    pid = tmp_path / "pid"

    def has_started() -> bool:
        return pid.exists() and pid.read_text().endswith("\n")

    if how == "out of time":
        begin = iter([0.0])
        monkeypatch.setattr(
            "lorainit.system.bounded_command.time", Clock(lambda: next(begin, 2.0 if has_started() else 0.0))
        )
    is_cancelled = has_started if how == "unwanted" else lambda: False
    assert run_command(["sh", "-c", f"sleep 600 & echo $! > {pid}; wait"], seconds=1, is_cancelled=is_cancelled) is None
    wait_until_gone(int(pid.read_text()))


def test_a_program_that_is_not_there_is_an_error() -> None:
    with pytest.raises(FileNotFoundError):
        run_command(["no such program"], seconds=1)
