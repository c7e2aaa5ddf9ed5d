"""Child processes: tied to their parent, brought back when they fall, killed when they will not stop."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from api.embedded.children import Child, follow
from tests.api.cli.conftest import gone
from tests.promises import within

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
PARENT = """
import os, sys, time
from pathlib import Path
from api.embedded.children import Child
child = Child("sleeper", [sys.executable, "-c", "import time; time.sleep(60)"], os.environ, Path(sys.argv[1]))
child.start()
print(child.process.pid, flush=True)
time.sleep(60)
"""


def make(tmp_path: Path, command: list[str], **more: float) -> Child:
    return Child("it", command, os.environ, tmp_path / "log", **more)  # type: ignore[arg-type]


def test_a_child_dies_with_a_killed_parent(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path / "log")], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    assert gone([pid], seconds=within(2))


def test_a_fallen_child_is_started_later_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    child = make(tmp_path, [sys.executable, "-c", "raise SystemExit(3)"])
    child.start()
    pauses = []
    for _ in range(8):
        assert child.process is not None
        child.process.wait()
        news = child.restart_if_ended()
        assert news is not None
        assert "exit code 3" in news
        pauses.append(child.start_at - clock)
        assert child.restart_if_ended() is None
        assert child.process is None  # not before its time
        clock = child.start_at
        child.restart_if_ended()
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30]
    child.stop()


def test_a_child_that_ran_well_starts_again_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    child = make(tmp_path, [sys.executable, "-c", ""])
    child.failures = 6
    child.start()
    assert child.process is not None
    child.process.wait()
    clock += 120
    child.restart_if_ended()
    assert child.start_at - clock == 0.5


def test_a_child_that_ignores_sigterm_is_killed_with_its_own_children(tmp_path: Path) -> None:
    ignore = "signal.signal(15, signal.SIG_IGN)"
    stubborn = f"import signal, subprocess, sys, time; {ignore}; subprocess.run(sys.argv[1:]); time.sleep(60)"
    child = make(tmp_path, [sys.executable, "-c", stubborn, *SLEEP], grace=0.3)
    child.start()
    assert child.process is not None
    time.sleep(0.5)
    below = [
        int(pid) for pid in Path(f"/proc/{child.process.pid}/task/{child.process.pid}/children").read_text().split()
    ]
    pids = [child.process.pid, *below]
    assert len(pids) == 2
    child.stop()
    assert gone(pids, seconds=within(1))


def test_following_a_log_gives_whole_lines_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    lines = follow(log, start=0)
    assert next(lines) == []
    log.write_text("one\ntw")
    assert next(lines) == ["one"]
    with log.open("a") as file:
        file.write("o\n\nthree\n")
    assert next(lines) == ["two", "", "three"]
    log.write_text("anew\n")
    assert next(lines) == ["anew"]
