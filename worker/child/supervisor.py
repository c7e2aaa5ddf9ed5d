"""The child process of a run: starts it, reads its events, and stops its whole process tree. Loads no torch itself.

Each run has a process of its own, so that a crash or an out-of-memory kill ends the run and not the worker, and
so that its end frees all device memory. The child gets no credentials of
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

from api.core.devices.run_environment import PROGRAM, make_run_environment
from api.core.logs import get_logger
from lorainit.config.events import EVENT, Event
from worker.child.warm import ForkedRun, WarmProcess
from worker.host.memory import count_oom_kills, offer_to_the_oom_killer

# Exit codes of a child that somebody else has killed or asked to end.
FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP, 128 + signal.SIGTERM)
POLL_SECONDS = 0.2  # because `should_stop` has to be asked even if no event comes
END_SECONDS = 60.0  # for a process to end after it has closed its pipe or was killed, because freeing a GPU takes time
Child = subprocess.Popen[bytes] | ForkedRun
StopReason = Literal["", "drain", "lost", "hangs"]


@dataclass(frozen=True)
class RunPaths:
    """For one job of a run: its spec, the folder for its files, and its lease file."""

    spec: Path
    out: Path
    lease: Path


@dataclass(frozen=True)
class Outcome:
    """How a child ended: its exit code, or that we stopped it.

    `memory_ran_out`: the system killed a process for lack of memory meanwhile. If the system does not count such kills,
    a kill counts as a lost run, which is tried again until the attempts are used up.
    `hangs`: it was killed because nothing happened in it any more; `stopped` is False then. `stuck`: the child, if
    even that did not end it, because it waits inside a driver.
    """

    returncode: int
    stopped: bool
    stderr_tail: str
    memory_ran_out: bool = False
    hangs: bool = False
    stuck: psutil.Process | None = None

    @property
    def crash(self) -> str | None:
        """The signal by which the child crashed, such as "SIGABRT"; None if it exited or somebody else killed it."""
        is_crash = self.returncode < 0 and self.returncode not in FROM_OUTSIDE
        return signal.Signals(-self.returncode).name if is_crash else None

    @property
    def has_run_out_of_memory(self) -> bool:
        """Whether the system killed it for lack of memory, or bitsandbytes exited because CUDA had no memory left."""
        if self.returncode == -signal.SIGKILL:
            return self.memory_ran_out and not self.hangs
        last = self.stderr_tail.strip().rsplit("\n", 1)[-1]
        return self.returncode > 0 and last.startswith("Error out of memory at line ")

    @property
    def is_from_outside(self) -> bool:
        """Whether somebody else killed the child, or asked it to end."""
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
    """Run one or more jobs in a child until it ends, or until `should_stop` returns why it has to stop.

    On "drain" the child is asked to end, and its events are read for `grace` more seconds, because it writes a
    checkpoint. On "lost" or "hangs" it is killed at once. A child that closes its pipe and does not end counts as
    "hangs", too. It works in the folder of the first of `run_paths`.

    Args:
        on_event: called in this thread for each event, whose `member` is an index into `run_paths`.
        should_stop: called several times a second.
        gpus: the only GPUs that the child sees, by their names in CUDA; None = as this process.
        program: always started, instead of `PROGRAM` or a fork.
        warm: the process from which the child is forked, if it is ready. It is prepared for the next run afterwards.
    """
    kills = count_oom_kills()
    reader, writer = os.pipe()
    folder = run_paths[0].out.parent
    stderr = folder / "stderr.log"
    environment = make_run_environment(gpus)
    warm = warm if program is None else None
    with stderr.open("wb") as log:
        for_it = {**environment, "TMPDIR": str(folder)}
        child: Child | None = None
        if warm is not None:
            child = warm.fork(
                _make_arguments(run_paths), folder=folder, environment=for_it, files=[writer, log.fileno()]
            )
        child = child or subprocess.Popen(
            [*(program or PROGRAM), *_make_arguments(run_paths), "--events-fd", str(writer)],
            env=for_it,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[writer],
            start_new_session=True,  # so that Ctrl+C in a terminal reaches only the worker, which stops in order
        )
    os.close(writer)  # ours, because otherwise the pipe would not end with the child
    try:
        why = _supervise(child, reader, on_event, should_stop, grace)
    finally:
        _close(child)
    if warm is not None:
        warm.prepare(environment)
    return Outcome(
        -signal.SIGKILL if child.returncode is None else child.returncode,
        stopped=why in ("drain", "lost"),
        stderr_tail=_read_tail(stderr),
        memory_ran_out=kills is not None and count_oom_kills() != kills,
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
    """Read a child's events until it has ended; returns why it was stopped, or ""."""
    offer_to_the_oom_killer(child.pid)
    family = list[psutil.Process]()
    try:
        stopped = _listen(reader, on_event, should_stop)
        if stopped == "drain":
            family = _find_descendants(child)  # now, because the children of a process that has ended are not found
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


def _close(child: Child) -> None:
    """Leave the child's context if it has ended, because leaving it would wait for a child that cannot be ended."""
    if child.returncode is not None:
        with child:
            pass
    elif isinstance(child, ForkedRun):
        child.abandon()


def _make_arguments(run_paths: Sequence[RunPaths]) -> list[str]:
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
        # Neither the line nor the message is logged, because both may quote rows, and logs are kept.
        kinds = [fault["type"] for fault in error.errors()]
        get_logger(__name__).error("unreadable event from the run", length=len(line), error=kinds[:5])
        return None


def _until(deadline: float, should_stop: Callable[[], StopReason]) -> Callable[[], StopReason]:
    """When to stop reading from a child that was asked to end: its time is up, or its jobs are not ours any more."""

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
    """SIGKILL the child, everything below it, and `family`: processes that it had before and may have left behind.

    This does not end a process that waits inside a driver, so the wait is limited to `END_SECONDS`.
    """
    family = [*family, *_find_descendants(child)]
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


def _find_descendants(child: Child) -> list[psutil.Process]:
    try:
        return psutil.Process(child.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _read_tail(path: Path, size: int = 8000) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read().decode("utf-8", "replace")
