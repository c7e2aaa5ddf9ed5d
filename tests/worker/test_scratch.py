"""What dead attempts leave in the scratch folder, and that a live one loses nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from api.core.settings import get_settings
from worker import scratch

pytestmark = pytest.mark.usefixtures("environment")


def a_folder(name: str, *, seconds_old: float = 3600) -> Path:
    folder = get_settings().scratch() / name
    folder.mkdir(parents=True)
    (folder / "state.tar").write_bytes(b"x")
    _age(folder, seconds_old)
    return folder


def _age(folder: Path, seconds: float) -> None:
    os.utime(folder, (time.time() - seconds,) * 2)


def test_a_folder_whose_process_was_killed_goes() -> None:
    folder = a_folder("ftjob-a/attempt-1")
    code = f"from pathlib import Path; from worker import scratch; f = scratch.hold(Path({str(folder)!r}))"
    code += "; print('held', flush=True); import time; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        _age(folder, 3600)
        assert scratch.sweep() == []
        process.send_signal(signal.SIGKILL)
    assert scratch.sweep() == [folder]
    assert list(get_settings().scratch().iterdir()) == []


def test_a_held_folder_stays_until_it_is_let_go() -> None:
    folder = a_folder("ftjob-a/attempt-1")
    with scratch.hold(folder):
        _age(folder, 3600)
        assert scratch.sweep() == []
    _age(folder, 3600)
    assert scratch.sweep() == [folder]


def test_a_folder_that_was_just_made_is_not_taken_for_a_dead_one() -> None:
    a_folder("ftjob-a/attempt-1", seconds_old=0)
    assert scratch.sweep() == []


def test_a_dead_attempt_goes_without_its_living_neighbour() -> None:
    dead, living = a_folder("ftjob-a/attempt-1"), a_folder("ftjob-a/attempt-2")
    with scratch.hold(living):
        _age(living, 3600)
        assert scratch.sweep() == [dead]
    assert living.is_dir()


def test_only_drain_flags_of_workers_that_are_gone_go() -> None:
    folder = get_settings().scratch()
    folder.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    for pid in (os.getpid(), ended.pid):
        (folder / f"drain-{pid}").touch()
    assert scratch.sweep() == [folder / f"drain-{ended.pid}"]


def test_a_folder_cannot_be_held_twice() -> None:
    folder = a_folder("ftjob-a/attempt-1")
    with scratch.hold(folder), pytest.raises(BlockingIOError):
        scratch.hold(folder)
