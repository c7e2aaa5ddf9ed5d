"""The child process under its supervisor, with small scripts in the child's place."""

import json
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from structlog.testing import capture_logs

from lorainit.config.events import Done, Event, Failed, Message, Stage
from tests.promises import within
from worker.child import supervisor
from worker.child.supervisor import Outcome, RunPaths, run_child

PREAMBLE = """
import json, os, signal, subprocess, sys, time
fd = int(sys.argv[sys.argv.index("--events-fd") + 1])
def say(**event): os.write(fd, json.dumps(event).encode() + b"\\n")
"""


class Child:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events: list[Event] = []
        self.places = [RunPaths(spec=folder / "spec.json", out=folder / "out", lease=folder / "lease")]

    def run(self, script: str, *, stop_after: float | None = None, why: str = "lost", grace: float = 2.0) -> Outcome:
        path = self.folder / "child.py"
        path.write_text(PREAMBLE + textwrap.dedent(script))
        started = time.monotonic()
        due = lambda: stop_after is not None and time.monotonic() - started > stop_after  # noqa: E731
        return run_child(
            self.places,
            grace=grace,
            on_event=self.events.append,
            should_stop=lambda: why if due() else "",  # type: ignore[arg-type,return-value]
            program=(sys.executable, str(path)),
        )


@pytest.fixture
def child(tmp_path: Path) -> Child:
    return Child(tmp_path)


def test_events_arrive_in_order_with_the_last_word_at_the_end(child: Child) -> None:
    outcome = child.run("""
        say(kind="stage", stage="loading", message="a")
        say(kind="stage", stage="training", message="b")
        say(kind="done", adapter="x", trained_tokens=3, export_check={}, resources={})
    """)
    assert [event.stage for event in child.events if isinstance(event, Stage)] == ["loading", "training"]
    assert isinstance(child.events[-1], Done)
    assert (child.events[-1].trained_tokens, outcome.returncode, outcome.stopped) == (3, 0, False)


def test_a_failure_carries_the_childs_words(child: Child) -> None:
    outcome = child.run("""
        say(kind="failed", code="non_finite_loss", message="NaN at step 3.", param=None)
        sys.exit(1)
    """)
    assert child.events == [Failed(code="non_finite_loss", message="NaN at step 3.")]
    assert outcome.returncode == 1


def test_a_killed_child_is_seen_as_killed(child: Child) -> None:
    outcome = child.run("os.kill(os.getpid(), signal.SIGKILL)")
    assert (child.events, outcome.returncode) == ([], -9)


def test_a_line_that_is_no_event_is_skipped(child: Child) -> None:
    child.run("""
        os.write(fd, b"garbage\\n")
        say(kind="stage", stage="loading", message="a")
    """)
    assert len(child.events) == 1


def test_an_event_written_in_pieces_arrives_whole(child: Child) -> None:
    child.run("""
        line = json.dumps({"kind": "stage", "stage": "loading", "message": "é" * 500}).encode() + b"\\n"
        for byte in range(0, len(line), 100):
            os.write(fd, line[byte:byte + 100]); time.sleep(0.01)
    """)
    assert [event.message for event in child.events if isinstance(event, Stage)] == ["é" * 500]


def test_every_member_is_named_on_the_command_line_and_by_its_events(child: Child) -> None:
    second = child.folder / "second"
    child.places.append(RunPaths(spec=second / "spec.json", out=second / "out", lease=second / "lease"))
    child.run("""
        say(kind="message", message="first", data={"arguments": sys.argv[1:]})
        say(kind="message", message="second", member=1)
    """)
    first, other = child.events
    assert isinstance(first, Message)
    given = first.data["arguments"]
    assert given[:3] == [str(child.folder / "spec.json"), str(child.folder / "out"), "--lease"]
    assert given[3:5] == [str(child.folder / "lease"), "--member"]
    assert given[5:8] == [str(second / name) for name in ("spec.json", "out", "lease")]
    assert given[8] == "--events-fd"
    assert [event.member for event in child.events] == [0, 1]
    assert isinstance(other, Message)


def test_losing_the_job_kills_the_whole_tree_at_once(child: Child) -> None:
    started = time.monotonic()
    outcome = child.run(
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        grandchild = subprocess.Popen(["sleep", "60"], start_new_session=True)
        say(kind="stage", stage="loading", message=f"{os.getpid()} {grandchild.pid}")
        time.sleep(60)
        """,
        stop_after=0.5,
    )
    assert outcome.stopped
    assert time.monotonic() - started < within(3)
    assert isinstance(child.events[0], Stage)
    for pid in map(int, child.events[0].message.split()):
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_draining_lets_the_child_leave_by_itself(child: Child) -> None:
    outcome = child.run(
        """
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
        say(kind="stage", stage="loading", message="up")
        time.sleep(60)
        """,
        stop_after=0.7,
        why="drain",
        grace=5,
    )
    assert (outcome.stopped, outcome.returncode) == (True, 7)


def test_what_a_draining_child_still_says_is_heard(child: Child) -> None:
    outcome = child.run(
        """
        def leave(*_):
            for number in range(2000):  # more than the pipe holds
                say(kind="message", message=str(number), data={"rest": "x" * 50})
            sys.exit(143)
        signal.signal(signal.SIGTERM, leave)
        say(kind="stage", stage="loading", message="up")
        time.sleep(60)
        """,
        stop_after=0.7,
        why="drain",
        grace=10,
    )
    assert (outcome.returncode, len(child.events)) == (143, 2001)


def test_a_draining_child_that_does_not_leave_is_killed_in_the_end(child: Child) -> None:
    outcome = child.run(
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        say(kind="stage", stage="loading", message="up")
        time.sleep(60)
        """,
        stop_after=0.7,
        why="drain",
        grace=0.5,
    )
    assert (outcome.stopped, outcome.returncode) == (True, -9)


def test_an_exception_in_a_handler_leaves_no_child_behind(child: Child) -> None:
    def refuse(event: Event) -> None:
        child.events.append(event)
        raise RuntimeError("the database is gone")

    path = child.folder / "child.py"
    path.write_text(PREAMBLE + 'say(kind="stage", stage="loading", message=str(os.getpid()))\ntime.sleep(60)')
    with pytest.raises(RuntimeError, match="database"):
        run_child(
            child.places,
            grace=1,
            on_event=refuse,
            should_stop=lambda: "",
            program=(sys.executable, str(path)),
        )
    assert isinstance(child.events[0], Stage)
    assert not psutil.pid_exists(int(child.events[0].message))


def test_the_child_sees_no_secret_of_the_service(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LORAINIT_DATABASE_URL", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "secret-value")
    child.run('say(kind="message", message="env", data=dict(os.environ))')
    assert "secret-value" not in json.dumps(child.events[0].model_dump())


def test_what_the_child_prints_is_kept_for_the_log(child: Child) -> None:
    assert "Traceback" in child.run('raise ValueError("boom")').stderr_tail


def test_a_run_is_what_the_oom_killer_takes_first(child: Child) -> None:
    child.run("""
        time.sleep(0.2)
        say(kind="message", message=open("/proc/self/oom_score_adj").read().strip())
    """)
    assert isinstance(child.events[0], Message)
    assert child.events[0].message == "900"


def test_an_event_that_cannot_be_read_is_logged_without_its_words(child: Child) -> None:
    with capture_logs() as logs:
        child.run("""say(kind="message", level="zanzibarquince", message="zanzibarquince")""")
    (said,) = [entry for entry in logs if "unreadable" in entry["event"]]
    assert "literal_error" in said["error"]
    assert "zanzibarquince" not in str(said)


def test_a_run_that_hangs_is_killed_and_not_called_stopped(child: Child) -> None:
    outcome = child.run("os.kill(os.getpid(), signal.SIGSTOP)", stop_after=0.5, why="hangs")
    assert (outcome.returncode, outcome.hangs, outcome.stopped, outcome.stuck) == (-9, True, False, None)


def test_a_run_that_hangs_is_no_lack_of_memory_and_not_killed_from_outside() -> None:
    outcome = Outcome(-9, stopped=False, stderr_tail="", memory_ran_out=True, hangs=True)
    assert not outcome.has_run_out_of_memory
    assert not outcome.is_from_outside


def test_a_run_that_has_said_all_and_does_not_end_hangs(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "END_SECONDS", 0.5)
    outcome = child.run("os.close(fd); time.sleep(600)")
    assert (outcome.returncode, outcome.hangs) == (-9, True)


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_nobody_waits_for_a_process_that_cannot_be_killed(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "END_SECONDS", 0.2)
    with monkeypatch.context() as inside_a_driver:
        inside_a_driver.setattr("subprocess.Popen.kill", lambda _self: None)
        outcome = child.run("time.sleep(600)", stop_after=0.5)
    assert outcome.stopped
    assert outcome.stuck is not None
    outcome.stuck.kill()
    outcome.stuck.wait(within(10))
