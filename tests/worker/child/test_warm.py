"""Runs that are forked from a process which is warm, with small scripts in the run's place, and once with real ones."""

import json
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from api.core.devices.run_environment import make_environment_without_secrets
from lorainit.config.events import Event, Message, Metrics
from tests.promises import within
from worker.child.supervisor import Outcome, RunPaths, run_child
from worker.child.warm import WarmProcess

# What `lorainit.warm` is, but for what it loads and what a run does: `run(say, arguments)` of the script `RUN`.
STUB = """
import json, os, runpy, sys, types
from lorainit import warm
def run(arguments):
    fd = int(arguments[arguments.index("--events-fd") + 1])
    def say(text, **data):
        os.write(fd, json.dumps({"kind": "message", "message": text, "data": data}).encode() + b"\\n")
    return runpy.run_path(os.environ["RUN"], init_globals={"say": say, "arguments": arguments}).get("code", 0)
sys.modules["lorainit.__main__"] = types.SimpleNamespace(main=run)
warm._import_libraries = lambda: None
sys.exit(warm.main(sys.argv[1:]))
"""


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


def made_ready(warm: WarmProcess) -> psutil.Process:
    warm.prepare(make_environment_without_secrets())
    until(warm.is_ready, 250)
    assert warm.process is not None
    return psutil.Process(warm.process.pid)


@pytest.fixture
def warm() -> Iterator[WarmProcess]:
    warm = WarmProcess((sys.executable, "-c", STUB))
    made_ready(warm)
    yield warm
    warm.close()


class Slot:
    """Runs `script` as a slot would."""

    def __init__(self, folder: Path, warm: WarmProcess, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.warm, self._patch = folder, warm, monkeypatch
        self.said: list[Message] = []

    def run(self, script: str, *, name: str = "a", stop: str = "", grace: float = 5.0, spec: str = "{}") -> Outcome:
        """`stop`: why it is stopped once it has said something."""
        place = self.folder / name
        place.mkdir()
        (place / "run.py").write_text(textwrap.dedent(script))
        (place / "spec.json").write_text(spec)
        (place / "lease").write_text(repr(time.monotonic() + 60))
        self._patch.setenv("RUN", str(place / "run.py"))
        return run_child(
            [RunPaths(spec=place / "spec.json", out=place / "out", lease=place / "lease")],
            grace=grace,
            on_event=self._take,
            should_stop=lambda: stop if self.said else "",  # type: ignore[arg-type,return-value]
            warm=self.warm,
        )

    def _take(self, event: Event) -> None:
        assert isinstance(event, Message)
        self.said.append(event)

    @property
    def last(self) -> dict[str, object]:
        return self.said[-1].data


@pytest.fixture
def slot(tmp_path: Path, warm: WarmProcess, monkeypatch: pytest.MonkeyPatch) -> Slot:
    return Slot(tmp_path, warm, monkeypatch)


def pid_of(warm: WarmProcess) -> int:
    assert warm.process is not None
    return warm.process.pid


def test_a_run_has_a_process_a_session_and_a_folder_of_its_own(slot: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/elsewhere")
    monkeypatch.setenv("LORAINIT_DATABASE_URL", "postgresql://secret")
    outcome = slot.run(
        """
        import tempfile
        facts = {"pid": os.getpid(), "parent": os.getppid(), "session": os.getsid(0), "cwd": os.getcwd()}
        say("here", **facts, tmp=tempfile.gettempdir(), secret=os.environ.get("LORAINIT_DATABASE_URL"))
        print("to the log")
        import sys; sys.stderr.write("and this"); code = 3
    """.replace("import tempfile", "import os, tempfile")
    )
    place, found = str(slot.folder / "a"), slot.last
    assert (outcome.returncode, outcome.stopped) == (3, False)
    assert "to the log" in outcome.stderr_tail
    assert "and this" in outcome.stderr_tail
    assert (found["parent"], found["session"], found["cwd"], found["tmp"]) == (
        pid_of(slot.warm),
        found["pid"],
        place,
        place,
    )
    assert found["secret"] is None


def test_a_run_shows_its_own_command_line(slot: Slot) -> None:
    slot.run("""
        from pathlib import Path
        say("shown", words=Path("/proc/self/cmdline").read_bytes().rstrip(b"\\0").decode().split("\\0"), own=arguments)
    """)
    assert slot.last["words"] == [sys.executable, "-m", "lorainit", *slot.last["own"]]  # type: ignore[misc]
    assert str(slot.folder / "a" / "spec.json") in slot.last["words"]


def test_what_is_warm_never_knows_of_a_run(slot: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the order nor what a run makes of it is in the memory that the next run is forked with."""
    monkeypatch.setenv("MARK", "only-of-" + "this-run")
    slot.run("""
        import os, sys
        sys.kept = [os.environ["MARK"]] * 1000
        say("kept", there=sys.kept[0])
    """)
    assert slot.last["there"] == "only-of-this-run"
    assert b"only-of-" + b"this-run" not in memory(pid_of(slot.warm))
    assert b"lorainit.warm" in memory(pid_of(slot.warm))
    monkeypatch.delenv("MARK")
    slot.run("import os, sys\nsay('next', kept=hasattr(sys, 'kept'), mark=os.environ.get('MARK'))", name="b")
    assert slot.last == {"kept": False, "mark": None}


def memory(pid: int) -> bytes:
    found = b""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as mem:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            places, rights, *_ = line.split()
            if rights.startswith("rw"):
                start, end = (int(place, 16) for place in places.split("-"))
                mem.seek(start)
                found += mem.read(end - start)
    return found


def test_a_lost_run_is_killed_with_what_it_started_and_the_next_one_is_forked(slot: Slot) -> None:
    before = pid_of(slot.warm)
    outcome = slot.run(
        """
        import subprocess, time
        other = subprocess.Popen(["sleep", "1000"])
        say("both", other=other.pid)
        time.sleep(1000)
        """,
        stop="lost",
    )
    assert (outcome.returncode, outcome.stopped) == (-signal.SIGKILL, True)
    assert not psutil.pid_exists(int(slot.last["other"]))  # type: ignore[call-overload]
    slot.said.clear()
    assert slot.run("say('next')", name="b").returncode == 0
    assert pid_of(slot.warm) == before


def test_a_drained_run_is_asked_to_leave_and_heard(slot: Slot) -> None:
    outcome = slot.run(
        """
        import signal, sys, time
        def leave(*_): say("leaving"); sys.exit(143)
        signal.signal(signal.SIGTERM, leave)
        say("started")
        time.sleep(1000)
        """,
        stop="drain",
    )
    assert [one.message for one in slot.said] == ["started", "leaving"]
    assert (outcome.returncode, outcome.stopped) == (143, True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_run_that_is_killed_is_seen_as_killed(slot: Slot, number: signal.Signals) -> None:
    outcome = slot.run(f"import os\nos.kill(os.getpid(), {int(number)})")
    assert (outcome.returncode, outcome.stopped) == (-number, False)


def test_a_run_dies_with_what_it_was_forked_from_and_the_next_is_started_from_scratch(slot: Slot) -> None:
    before = pid_of(slot.warm)
    outcome = slot.run("import os, time\nos.kill(os.getppid(), 9)\ntime.sleep(1000)")
    assert (outcome.returncode, outcome.stopped) == (-signal.SIGKILL, False)
    until(slot.warm.is_ready)
    assert pid_of(slot.warm) != before


@pytest.mark.parametrize("stop", ["", "lost", "drain"])
def test_a_run_whose_origin_is_frozen_counts_as_killed_when_it_has_ended(slot: Slot, stop: str) -> None:
    """Nobody can say how it ended, and the slot waits for nobody."""
    origin = slot.warm.process
    assert origin is not None
    wait = "" if not stop else "import time; time.sleep(60)"
    outcome = slot.run(f"import os, signal; os.kill(os.getppid(), signal.SIGSTOP); say('frozen'); {wait}", stop=stop)
    assert (outcome.returncode, outcome.stopped) == (-9, bool(stop))
    assert origin.poll() is not None, "it is ended, frozen as it is"
    until(slot.warm.is_ready)
    slot.said.clear()
    assert slot.run("say('next')", name="b").returncode == 0


def test_without_an_answer_a_run_is_started_from_scratch(slot: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.child.warm.ANSWER_SECONDS", 0.2)
    silent, marker = psutil.Process(pid_of(slot.warm)), slot.folder / "program.py"
    marker.write_text("import os, sys\nprint('from scratch', file=sys.stderr)")
    monkeypatch.setattr("worker.child.supervisor.PROGRAM", (sys.executable, str(marker)))
    silent.suspend()
    assert "from scratch" in slot.run("say('forked')").stderr_tail
    assert not silent.is_running()


def test_a_run_on_several_devices_begins_before_torch_is_loaded(slot: Slot, tmp_path: Path) -> None:
    outcome = slot.run("say('forked')", spec='{"devices": 2}')
    assert outcome.returncode == 2  # of the real program, which does not take this spec
    assert slot.said == []


def test_all_of_it_dies_with_the_slot(tmp_path: Path) -> None:
    script = f"""
import os, sys, time
from pathlib import Path
from worker.child.supervisor import RunPaths, run_child
from worker.child.warm import WarmProcess
from tests.worker.child import test_warm
warm = WarmProcess((sys.executable, "-c", test_warm.STUB))
test_warm.made_ready(warm)
place = Path({str(tmp_path)!r})
(place / "spec.json").write_text("{{}}")
(place / "run.py").write_text("import os, time; say('here', pid=os.getpid()); time.sleep(1000)")
os.environ["RUN"] = str(place / "run.py")
def say(event): print(warm.process.pid, event.data["pid"], flush=True)
run_child([RunPaths(place / "spec.json", place / "out", place / "lease")], grace=0, on_event=say,
          should_stop=lambda: "", warm=warm)
"""
    slot = psutil.Popen([sys.executable, "-c", script], stdout=-1, text=True, cwd=Path(__file__).parents[3])
    processes = [psutil.Process(int(word)) for word in slot.stdout.readline().split()]
    assert len(processes) == 2
    slot.kill()
    slot.communicate()
    assert psutil.wait_procs(processes, timeout=within(5))[1] == []


def test_a_real_run_that_is_forked_ends_with_the_bits_of_one_from_scratch(tmp_path: Path) -> None:
    from tests.lorainit.conftest import make_tokenizer, tiny_llama  # which loads torch

    tiny_llama().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    rows = [
        {"messages": [{"role": "user", "content": str(n)}, {"role": "assistant", "content": "ab"}]} for n in range(6)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = {
        "model": {"id": "tiny", "source": str(tmp_path / "base"), "root": "local:tiny"},
        "data": {"training": str(tmp_path / "rows.jsonl"), "validation": None},
        "lora": {"r": 2, "init": "lora_ga"},
        "training": {"max_steps": 2, "batch_size": 2, "max_length": 64},
    }
    losses, weights = [], []
    warm = WarmProcess()
    try:
        process = made_ready(warm)
        assert process.num_threads() == 1
        for name, used in (("forked", warm), ("scratch", None)):
            place, events = tmp_path / name, list[Event]()
            place.mkdir()
            (place / "spec.json").write_text(json.dumps(spec))
            (place / "lease").write_text(repr(time.monotonic() + 600))
            places = [RunPaths(spec=place / "spec.json", out=place / "out", lease=place / "lease")]
            outcome = run_child(places, grace=0, on_event=events.append, should_stop=lambda: "", warm=used)
            assert outcome.returncode == 0, outcome.stderr_tail
            losses.append([event.train_loss for event in events if isinstance(event, Metrics)])
            weights.append((place / "out" / "adapter" / "adapter_model.safetensors").read_bytes())
            (place / "lease").unlink()
        assert process.is_running()
    finally:
        warm.close()
    assert losses[0] == losses[1]
    assert weights[0] == weights[1]
