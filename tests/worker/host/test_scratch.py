"""What dead attempts leave in the scratch folder, and that a live one loses nothing."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from api.core.settings import get_settings
from worker.host import scratch

pytestmark = [pytest.mark.usefixtures("environment"), pytest.mark.one_database]


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
    code = f"from pathlib import Path; from worker.host import scratch; f = scratch.lock_folder(Path({str(folder)!r}))"
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
    with scratch.lock_folder(folder):
        _age(folder, 3600)
        assert scratch.sweep() == []
    _age(folder, 3600)
    assert scratch.sweep() == [folder]


def test_a_folder_that_was_just_made_is_not_taken_for_a_dead_one() -> None:
    a_folder("ftjob-a/attempt-1", seconds_old=0)
    assert scratch.sweep() == []


def test_a_dead_attempt_goes_without_its_living_neighbour() -> None:
    dead, living = a_folder("ftjob-a/attempt-1"), a_folder("ftjob-a/attempt-2")
    with scratch.lock_folder(living):
        _age(living, 3600)
        assert scratch.sweep() == [dead]
    assert living.is_dir()


def test_a_drain_flag_goes_only_when_its_worker_is_gone_whichever_host_that_was_on() -> None:
    flag = get_settings().scratch() / f"{scratch.FLAG}another-host-1-ab"
    code = f"from pathlib import Path; from worker.host import scratch; scratch.raise_flag(Path({str(flag)!r}))"
    code += "; print('raised', flush=True); import time; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert scratch.sweep() == [], "it is young"
        _age(flag, 3600)
        assert scratch.sweep() == []
        process.send_signal(signal.SIGKILL)
    assert scratch.sweep() == [flag]


def test_workers_with_the_same_number_on_one_volume_have_flags_of_their_own() -> None:
    code = "from worker.app import drain_file; print(drain_file(7).name)"
    names = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(names) == 2
    assert all(name.startswith(f"{scratch.FLAG}{socket.gethostname()}-7-") for name in names)


def test_a_folder_cannot_be_held_twice() -> None:
    folder = a_folder("ftjob-a/attempt-1")
    with scratch.lock_folder(folder), pytest.raises(BlockingIOError):
        scratch.lock_folder(folder)
