"""Starts and watches the other processes of a run on several devices of this host, and ends them with the run.

torchrun is not used because it passes on neither the pipe of events nor our exit codes, and its agent would be one more
process to watch. The kernel kills each process when rank 0 dies, so that none is left behind.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from lorainit.config.events import Event, Failed
from lorainit.runtime import process_tuning
from lorainit.system import shared_memory
from lorainit.system.limits import make_parent_death_hook

EXIT_SECONDS = 30.0  # how long the peers may take to end after rank 0
REPORT_SECONDS = 5.0  # how long rank 0 may take to report a failure by itself
CASCADE_SECONDS = 2.0  # within this time the end of one process ends the others too
# Environment variable: the file through which the processes of one run connect (`lorainit.runtime.distributed.world`).
RENDEZVOUS = "RENDEZVOUS"

Process = subprocess.Popen[bytes]


@dataclass(frozen=True)
class PeerFailure:
    """How another process of the run failed: its exit code (-n: killed by signal n), and its `Failed` event if any."""

    code: int
    event: Failed | None

    def sort_key(self) -> int:
        """Order failures from causes to consequences, so that the run reports the cause.

        0: the process reported a specific error; 1: a signal killed it; 2: another exit code; 3: exit code 1, with
        which a process also ends because another one has ended.
        """
        if self.event is not None and self.event.code not in ("internal_error", "worker_lost"):
            return 0
        if self.event is not None and self.event.message == shared_memory.FULL:
            return 0
        return 1 if self.code < 0 else 3 if self.code == 1 else 2


class PeerProcesses:
    """The processes of a run other than rank 0; empty if a run has one process."""

    def __init__(self, processes: Sequence[Process] = (), out: Path = Path()) -> None:
        self._processes, self._out = processes, out
        self._over = threading.Event()

    def watch(self, on_failure: Callable[[PeerFailure], None]) -> None:
        """Call `on_failure` in a thread when a process fails and rank 0 does not end soon by itself.

        Rank 0 cannot notice that itself, because it may be waiting for that process in a collective for ever.
        """
        for peer in self._processes:
            threading.Thread(target=self._watch, args=(peer, on_failure), daemon=True).start()

    def find_failure(self) -> PeerFailure | None:
        """The failure of another process that explains a failed collective here; None if there is none.

        Waits a few seconds, because the other process may end a little later.
        """
        ended = self._wait(any, seconds=REPORT_SECONDS)
        return self._find_cause() if ended else None

    def kill(self) -> None:
        """Kill them, because rank 0 has stopped or failed and they would wait for it in their next collective."""
        self._over.set()
        for peer in self._processes:
            peer.kill()

    @property
    def have_ended(self) -> bool:
        """Whether there were other processes and all of them have ended."""
        return bool(self._processes) and all(peer.poll() is not None for peer in self._processes)

    def close(self) -> None:
        """Wait for them to end; kill those that do not end in time."""
        self._over.set()
        for peer in self._processes:
            try:
                peer.wait(EXIT_SECONDS)
            except subprocess.TimeoutExpired:
                peer.kill()  # SIGKILL, because a frozen process does not react to other signals

    def _watch(self, peer: Process, on_failure: Callable[[PeerFailure], None]) -> None:
        if peer.wait() and not self._over.wait(REPORT_SECONDS):
            on_failure(self._find_cause())

    def _wait(self, which: Callable[[Iterable[bool]], bool], *, seconds: float) -> bool:
        """Whether, within so many seconds, `which` (any or all) of them have failed or are about to end as failed."""
        until = time.monotonic() + seconds
        while self._processes:
            if which(self._failure_of(rank) is not None for rank in self._ranks):
                return True
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
        return False

    def _find_cause(self) -> PeerFailure:
        """The failure that ended the run; the other processes ended because of it."""
        self._wait(all, seconds=CASCADE_SECONDS)
        failures = []
        for rank in self._ranks:
            if failure := self._failure_of(rank):
                print(f"process {rank} of this run ended with exit code {failure.code}", file=sys.stderr, flush=True)  # noqa: T201
                failures.append(failure)
        return min(failures, key=PeerFailure.sort_key)

    @property
    def _ranks(self) -> range:
        return range(1, len(self._processes) + 1)

    def _failure_of(self, rank: int) -> PeerFailure | None:
        """How a process failed, or None. One that has written its failure counts, because ending may take seconds."""
        path, code = _failure_file(self._out, rank), self._processes[rank - 1].poll()
        event = Failed.model_validate_json(path.read_bytes()) if path.exists() else None
        return PeerFailure(code or 1, event) if code or (code is None and event) else None


@contextmanager
def start_peers(count: int, arguments: Sequence[str], *, out: Path) -> Iterator[PeerProcesses]:
    """Run `count` - 1 more processes with these arguments. This process becomes rank 0.

    Args:
        out: a folder of this run only; it is made if absent.
    """
    out.mkdir(parents=True, exist_ok=True)
    meeting = out / "rendezvous"
    for old in (meeting, *(_failure_file(out, rank) for rank in range(1, count))):
        old.unlink(missing_ok=True)  # left by an interrupted attempt; its processes would be taken for ours
    common = {"WORLD_SIZE": str(count), RENDEZVOUS: str(meeting.resolve()), **_share_threads(count)}
    os.environ.update(common | _rank_environment(0))
    command = [sys.executable, "-m", "lorainit", *arguments]
    processes = [
        subprocess.Popen(command, env={**os.environ, **_rank_environment(rank)}, preexec_fn=make_parent_death_hook())
        for rank in range(1, count)
    ]
    peers = PeerProcesses(processes, out)
    try:
        yield peers
    finally:
        peers.close()
        meeting.unlink(missing_ok=True)


def count_processes() -> int:
    """How many processes this run has, whether started by us or by torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def end_process(code: int) -> NoReturn:
    """End this process at once, without shutting the interpreter down.

    torch keeps the process group of a sharded base, with Gloo's threads, even after `destroy_process_group`. They are
    then destroyed while the interpreter shuts down, which sometimes ends the process with SIGABRT ("terminate called
    without an active exception") although its run is done. The other processes would take that for a crash, and the
    finished run would count as failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def write_peer_failure(out: Path, event: Event) -> None:
    """Write a peer's `Failed` event to a file, so that rank 0 can report it. Other events of peers are dropped,
    because rank 0 emits the same ones."""
    if isinstance(event, Failed):
        path = _failure_file(out, int(os.environ["RANK"]))
        draft = path.with_suffix(".new")
        draft.write_text(event.model_dump_json())
        draft.replace(path)


def _failure_file(out: Path, rank: int) -> Path:
    return out / f"failed-{rank}.json"


def _rank_environment(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def _share_threads(count: int) -> dict[str, str]:
    """Share the cores among the processes, because with a thread per core in each of them all would be slow."""
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, process_tuning.usable_cpus() // count))}
