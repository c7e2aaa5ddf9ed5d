"""The other processes of a run on several devices of this host: started, watched, and never left behind.

torchrun is not used: it passes on neither the pipe of events nor our exit codes, and its agent would be one more
process to watch. Each process watches the lease by itself, and the kernel kills it when rank 0 dies.
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

EXIT_SECONDS = 30.0  # seconds that the peers have to end after rank 0 has
REPORT_SECONDS = 5.0  # seconds that rank 0 has to report by itself what is wrong
CASCADE_SECONDS = 2.0  # seconds within which one that ends makes the others end too
# of the environment: the file by which the processes of one run meet (`lorainit.runtime.distributed.world`)
RENDEZVOUS = "RENDEZVOUS"

Process = subprocess.Popen[bytes]


@dataclass(frozen=True)
class PeerFailure:
    """How another process of the run failed: its exit code (-n: killed by signal n), and its `Failed` event if any."""

    code: int
    event: Failed | None

    def sort_key(self) -> int:
        """Orders failures from causes to consequences: first those that say what is wrong, last those that cannot."""
        if self.event is not None and self.event.code not in ("internal_error", "worker_lost"):
            return 0
        if self.event is not None and self.event.message == shared_memory.FULL:
            return 0
        return 1 if self.code < 0 else 3 if self.code == 1 else 2


class PeerProcesses:
    """The processes of a run beside rank 0; empty where a run has one process."""

    def __init__(self, processes: Sequence[Process] = (), out: Path = Path()) -> None:
        self._processes, self._out = processes, out
        self._over = threading.Event()

    def watch(self, on_failure: Callable[[PeerFailure], None]) -> None:
        """From now on call `on_failure`, in a thread, when one ends badly and this one does not end soon by itself.

        It may wait for that one for ever, in its next sum.
        """
        for peer in self._processes:
            threading.Thread(target=self._watch, args=(peer, on_failure), daemon=True).start()

    def find_failure(self) -> PeerFailure | None:
        """Whether one has ended badly, or says so, which explains a sum that failed here; it may show a bit later."""
        ended = self._wait(any, seconds=REPORT_SECONDS)
        return self._find_cause() if ended else None

    def kill(self) -> None:
        """Kill them: this process has stopped or failed, and they would wait for it in their next sum."""
        self._over.set()
        for peer in self._processes:
            peer.kill()

    @property
    def have_ended(self) -> bool:
        """Whether there were any, and none is left."""
        return bool(self._processes) and all(peer.poll() is not None for peer in self._processes)

    def close(self) -> None:
        """Wait for them to end; kill those that do not."""
        self._over.set()
        for peer in self._processes:
            try:
                peer.wait(EXIT_SECONDS)
            except subprocess.TimeoutExpired:
                peer.kill()  # which ends one that is frozen, too

    def _watch(self, peer: Process, on_failure: Callable[[PeerFailure], None]) -> None:
        if peer.wait() and not self._over.wait(REPORT_SECONDS):
            on_failure(self._find_cause())

    def _wait(self, which: Callable[[Iterable[bool]], bool], *, seconds: float) -> bool:
        """Whether any, or all, have ended badly, or are about to, within so many seconds."""
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
        """How a process failed. One that has written its failure is about to end, which may take seconds."""
        path, code = _failure_file(self._out, rank), self._processes[rank - 1].poll()
        event = Failed.model_validate_json(path.read_bytes()) if path.exists() else None
        return PeerFailure(code or 1, event) if code or (code is None and event) else None


@contextmanager
def start_peers(count: int, arguments: Sequence[str], *, out: Path) -> Iterator[PeerProcesses]:
    """Run `count` - 1 more processes with these arguments beside this one, which becomes rank 0.

    Args:
        out: a folder of the run's own, made if absent.
    """
    out.mkdir(parents=True, exist_ok=True)
    meeting = out / "rendezvous"
    for old in (meeting, *(_failure_file(out, rank) for rank in range(1, count))):
        old.unlink(missing_ok=True)  # of an interrupted run: its ranks are not ours
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
    """How many processes this run has, whether we or torchrun started them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def end_process(code: int) -> NoReturn:
    """End this process at once, without taking its interpreter down.

    torch keeps the process group of a base that was sharded, and Gloo's threads with it, even after
    `destroy_process_group`. They are then destroyed while the interpreter goes, which now and then ends the
    process with SIGABRT ("terminate called without an active exception") although its run is done: the others
    would take it for a crash, and a finished run for a lost one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def write_peer_failure(out: Path, event: Event) -> None:
    """Write a peer's `Failed` event to a file, from which rank 0 reports it; other events of peers are dropped."""
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
    """Share the cores among the processes: if each had a thread per core, all of them would be slow."""
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, process_tuning.usable_cpus() // count))}
