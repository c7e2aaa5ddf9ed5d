"""The child process: start it, read what it says, stop its whole tree. Loads no torch itself.

A process per run means that a crash or an out-of-memory kill takes the run and not the worker, and
that the end of the process frees every byte of device memory. The child gets no credentials of
database, broker or storage.
"""

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from pydantic import ValidationError

from api.core.devices.run_environment import PROGRAM, environment_of_runs
from api.core.logs import get_logger
from lorainit.config.events import EVENT, Event
from worker.child.warm import ForkedRun, WarmProcess
from worker.host.memory import offer_to_the_oom_killer, oom_kills

# How a child ends that somebody has killed, or asked to leave, who was not us.
FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP, 128 + signal.SIGTERM)
POLL_SECONDS = 0.2
END_SECONDS = 60.0  # for a process to be gone that has said all, or was killed: a GPU's memory is freed meanwhile
Child = subprocess.Popen[bytes] | ForkedRun
StopReason = Literal["", "drain", "lost", "hangs"]


@dataclass(frozen=True)
class RunPaths:
    """Where one member of a run finds its spec, leaves its files and looks for its lease."""

    spec: Path
    out: Path
    lease: Path


@dataclass(frozen=True)
class Outcome:
    """How a child ended: its exit code, or that we stopped it.

    `memory_ran_out`: the system killed something for lack of memory meanwhile. Where it keeps no count of
    that, a kill is taken for a lost worker's, and tried again until the attempts run out.
    `hangs`: it was killed since nothing happened in it any more, which is not called stopped. `stuck`: the child, if
    even that did not end it: it waits inside a driver.
    """

    returncode: int
    stopped: bool
    stderr_tail: str
    memory_ran_out: bool = False
    hangs: bool = False
    stuck: psutil.Process | None = None

    @property
    def crash(self) -> str | None:
        """The signal that ended the child from inside, as "SIGABRT"; None where it left or somebody else killed it."""
        is_crash = self.returncode < 0 and self.returncode not in FROM_OUTSIDE
        return signal.Signals(-self.returncode).name if is_crash else None

    @property
    def has_run_out_of_memory(self) -> bool:
        """Whether the system killed it for want of memory, or bitsandbytes left because CUDA had none for it."""
        if self.returncode == -signal.SIGKILL:
            return self.memory_ran_out and not self.hangs
        last = self.stderr_tail.strip().rsplit("\n", 1)[-1]
        return self.returncode > 0 and last.startswith("Error out of memory at line ")

    @property
    def is_from_outside(self) -> bool:
        """Whether somebody killed the child, or asked it to leave, who was not us."""
        return self.returncode in FROM_OUTSIDE and not self.hangs


def run_child(
    run_paths: Sequence[RunPaths],
    *,
    grace: float,
    on_event: Callable[[Event], None],
    should_stop: Callable[[], StopReason],
    gpus: str | None = None,
    program: Sequence[str] | None = None,
    warm: WarmProcess | None = None,
) -> Outcome:
    """Run `program` for one or more members until it ends or `should_stop` says why it must; None = `PROGRAM`.

    `on_event` is called from this thread for each event, which names its member by its index in
    `places`, last words included; `should_stop` several times a second. On "drain" the child is asked to
    leave and heard for `grace` more seconds: it has a checkpoint to tell. On "lost" or "hangs" it is killed at once.
    One that has closed its pipe and does not end hangs, too.
    `gpus`: the only ones that the child sees, by their names in CUDA; None = as this process. It works in the folder
    of the first place. `warm`: what it is forked from, if that is ready; it is made ready for the next one. A
    `program` that was given is always started.
    """
    kills = oom_kills()
    reader, writer = os.pipe()
    folder = run_paths[0].out.parent
    stderr = folder / "stderr.log"
    environment = environment_of_runs(gpus)
    warm = warm if program is None else None
    with stderr.open("wb") as log:
        for_it = {**environment, "TMPDIR": str(folder)}
        child: Child | None = None
        if warm is not None:
            child = warm.fork(_arguments(run_paths), folder=folder, environment=for_it, files=[writer, log.fileno()])
        child = child or subprocess.Popen(
            [*(program or PROGRAM), *_arguments(run_paths), "--events-fd", str(writer)],
            env=for_it,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[writer],
            start_new_session=True,
        )
    os.close(writer)
    try:
        why = _supervise(child, reader, on_event, should_stop, grace)
    finally:
        _let_go(child)
    if warm is not None:
        warm.prepare(environment)
    return Outcome(
        -signal.SIGKILL if child.returncode is None else child.returncode,
        stopped=why in ("drain", "lost"),
        stderr_tail=_tail(stderr),
        memory_ran_out=kills is not None and oom_kills() != kills,
        hangs=why == "hangs",
        stuck=psutil.Process(child.pid) if child.returncode is None else None,
    )


def _supervise(
    child: Child,
    reader: int,
    on_event: Callable[[Event], None],
    should_stop: Callable[[], StopReason],
    grace: float,
) -> StopReason:
    """Listen to a child until it has ended, by itself or not; returns why it was stopped, if it was."""
    offer_to_the_oom_killer(child.pid)
    family = list[psutil.Process]()
    try:
        stopped = _listen(reader, on_event, should_stop)
        if stopped == "drain":
            family = _family(child)
            child.send_signal(signal.SIGTERM)
            _listen(reader, on_event, _until(time.monotonic() + grace, should_stop))
            _await_end(child, 1.0 if grace else 0.0)
    except BaseException:
        stop_tree(child)
        raise
    finally:
        os.close(reader)
    if not stopped:
        _await_end(child, END_SECONDS)
        stopped = "hangs" if child.returncode is None else ""
    if stopped:
        stop_tree(child, family)
    return stopped


def _let_go(child: Child) -> None:
    """What the child's own context does, which would wait for one that cannot be ended."""
    if child.returncode is not None:
        with child:
            pass
    elif isinstance(child, ForkedRun):
        child.abandon()


def _arguments(run_paths: Sequence[RunPaths]) -> list[str]:
    first, *others = run_paths
    own = [str(first.spec), str(first.out), "--lease", str(first.lease)]
    return own + [part for one in others for part in ("--member", str(one.spec), str(one.out), str(one.lease))]


def _listen(reader: int, on_event: Callable[[Event], None], should_stop: Callable[[], StopReason]) -> StopReason:
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(reader, selectors.EVENT_READ)
        while True:
            if reason := should_stop():
                return reason
            if not selector.select(POLL_SECONDS):
                continue
            chunk = os.read(reader, 1 << 16)
            if not chunk:
                return ""
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                event = _parse(line)
                if event is not None:
                    on_event(event)


def _parse(line: bytes) -> Event | None:
    try:
        return EVENT.validate_json(line)
    except ValidationError as error:
        # Neither the line nor the fault's words: they may quote rows, and logs stay.
        kinds = [fault["type"] for fault in error.errors()]
        get_logger(__name__).error("unreadable event from the run", length=len(line), error=kinds[:5])
        return None


def _until(deadline: float, should_stop: Callable[[], StopReason]) -> Callable[[], StopReason]:
    """What ends the listening to a child that is to leave: its time is up, or nobody may run it any more."""

    def ends() -> StopReason:
        if time.monotonic() > deadline:
            return "drain"
        reason = should_stop()
        return "" if reason == "drain" else reason

    return ends


def _await_end(child: Child, seconds: float) -> None:
    with suppress(subprocess.TimeoutExpired):
        child.wait(seconds)


def stop_tree(child: Child, family: Sequence[psutil.Process] = ()) -> None:
    """SIGKILL the child and everything below it, and those of `family` that it had before and may have left.

    A process that waits inside a driver is not ended by that: nobody waits longer than `END_SECONDS` for it.
    """
    family = [*family, *_family(child)]
    child.kill()
    _await_end(child, END_SECONDS)
    if child.returncode is None:
        get_logger(__name__).error("a run's process cannot be killed", pid=child.pid)
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    _, left = psutil.wait_procs(family, timeout=5)
    if left:
        get_logger(__name__).error("processes of a stopped run are still there", pids=[one.pid for one in left])


def _family(child: Child) -> list[psutil.Process]:
    try:
        return psutil.Process(child.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _tail(path: Path, size: int = 8000) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read().decode("utf-8", "replace")
