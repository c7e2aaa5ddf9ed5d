"""The other processes of a run on several devices of this host: started, watched, and never left behind.

Not by torchrun, which hands on neither the pipe of events nor our exit codes, and whose agent would
be one more process to watch. Each process watches the lease itself and dies with the leading one.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lorainit import machine

PATIENCE = 30.0  # seconds for the others to end after the leading one has
LAST_WORDS = 5.0  # seconds for the leading one to say what is wrong with all of them
RENDEZVOUS = "RENDEZVOUS"  # of the environment: where the processes of one run meet (`lorainit.world`)


@contextmanager
def companions(count: int, arguments: Sequence[str], *, out: Path, failed: int) -> Iterator[None]:
    """Run `count` - 1 more processes with these arguments beside this one, which becomes the leading one.

    When one of them ends badly, this process soon ends with the exit code `failed`: it would wait for it
    in its next sum.

    Args:
        out: a folder of the run's own, made if absent.
    """
    out.mkdir(parents=True, exist_ok=True)
    meeting = out / "rendezvous"
    meeting.unlink(missing_ok=True)  # of an interrupted run: its ranks are not ours
    common = {"WORLD_SIZE": str(count), RENDEZVOUS: meeting.resolve().as_uri(), **_threads(count)}
    os.environ.update(common | _rank(0))
    command = [sys.executable, "-m", "lorainit", *arguments]
    others = [subprocess.Popen(command, env={**os.environ, **_rank(rank)}) for rank in range(1, count)]
    over = threading.Event()
    for other in others:
        threading.Thread(target=_watch, args=(other, others, over, failed), daemon=True).start()
    try:
        yield
    finally:
        over.set()
        for other in others:
            try:
                other.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                other.kill()
        meeting.unlink(missing_ok=True)


def _rank(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def _threads(count: int) -> dict[str, str]:
    """Cores are shared: as many waiting threads as cores for each process make all of them slow."""
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, machine.usable_cpus() // count))}


Process = subprocess.Popen[bytes]


def _watch(other: Process, everybody: Sequence[Process], over: threading.Event, failed: int) -> None:
    code = other.wait()
    if code and not over.wait(LAST_WORDS):
        print(f"another process of this run ended with exit code {code}", file=sys.stderr, flush=True)  # noqa: T201
        for one in everybody:
            one.kill()
        os._exit(failed)
