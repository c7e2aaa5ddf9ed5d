"""The child process: start it, read what it says, stop its whole tree. Loads no torch itself.

A process per run means that a crash or an out-of-memory kill takes the run and not the worker, and
that the end of the process frees every byte of device memory. The child gets no credentials of
database, broker or storage.
"""

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from pydantic import ValidationError

from api.core.logs import get_logger
from lorainit.events import EVENT, Event

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Place:
    """Where one member of a run finds its spec, leaves its files and looks for its lease."""

    spec: Path
    out: Path
    lease: Path


@dataclass(frozen=True)
class Outcome:
    """How a child ended: its exit code, or that we stopped it."""

    returncode: int
    stopped: bool
    stderr_tail: str


def run_child(
    places: Sequence[Place],
    *,
    grace: float,
    on_event: Callable[[Event], None],
    should_stop: Callable[[], Literal["", "drain", "lost"]],
    device: str | None = None,
    program: Sequence[str] = (sys.executable, "-m", "lorainit"),
) -> Outcome:
    """Run `program` for one or more members until it ends or `should_stop` says why it must.

    `on_event` is called from this thread for each event, which names its member by its index in
    `places`, last words included; `should_stop` several times a second. `device` is what the child
    sees as its only CUDA device. It works in the folder of the first place.
    """
    reader, writer = os.pipe()
    folder = places[0].out.parent
    stderr = folder / "stderr.log"
    with stderr.open("wb") as log:
        child = subprocess.Popen(
            [*program, *_arguments(places, writer)],
            env=_environment(folder, device),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[writer],
            start_new_session=True,
        )
    os.close(writer)
    _offer_to_the_oom_killer(child.pid)
    try:
        stopped = _listen(reader, on_event, should_stop)
    except BaseException:
        stop_tree(child, grace=0)
        raise
    finally:
        os.close(reader)
    if stopped:
        stop_tree(child, grace=grace if stopped == "drain" else 0)
    returncode = child.wait()
    return Outcome(returncode=returncode, stopped=bool(stopped), stderr_tail=_tail(stderr))


def _arguments(places: Sequence[Place], writer: int) -> list[str]:
    first, *others = places
    own = [str(first.spec), str(first.out), "--events-fd", str(writer), "--lease", str(first.lease)]
    return own + [part for one in others for part in ("--member", str(one.spec), str(one.out), str(one.lease))]


def _listen(
    reader: int, on_event: Callable[[Event], None], should_stop: Callable[[], Literal["", "drain", "lost"]]
) -> str:
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
        get_logger(__name__).error("unreadable event from the run", line=line[:200], error=str(error))
        return None


def stop_tree(child: subprocess.Popen[bytes], *, grace: float) -> None:
    """SIGTERM, wait `grace` seconds, SIGKILL the whole tree as it was before the first signal."""
    try:
        family = psutil.Process(child.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    if grace > 0:
        child.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + grace
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
    child.kill()
    child.wait()
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    _, left = psutil.wait_procs(family, timeout=5)
    if left:
        get_logger(__name__).error("processes of a stopped run are still there", pids=[one.pid for one in left])


def _environment(folder: Path, device: str | None) -> dict[str, str]:
    """What the child may know: no settings of the service, so none of its secrets."""
    hidden = ("LORAINIT_", "AWS_", "POSTGRES_", "PG", "REDIS_", "VALKEY_", "OPENAI_", "CELERY_", "OTEL_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    chosen = {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
    return {**kept, **chosen, "TMPDIR": str(folder), "TOKENIZERS_PARALLELISM": "false"}


def _offer_to_the_oom_killer(pid: int) -> None:
    """When memory runs out, the system should take the run and leave the worker to report it."""
    with suppress(OSError):  # not Linux, or the child has ended already
        Path(f"/proc/{pid}/oom_score_adj").write_text("900")


def _tail(path: Path, size: int = 8000) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read().decode("utf-8", "replace")
