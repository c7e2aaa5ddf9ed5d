"""Do fifty people who look on slow the work down? Polls, streams, and a worker's progress, in one run.

    python benchmarks/load.py [--clients 50] [--jobs 1000] [--pause 0.5] [--seconds 8] [--write docs/operations.md]

Real PostgreSQL, Valkey, web process and reconciler. The jobs are submitted over HTTP and stay queued; one is
held by a stub worker that records steps through the worker's own code, at the pace of a run and as fast as it
can. Quiet and busy phases take turns. In a busy one each client looks at a job, then at its events, then pauses,
and beside that holds a stream of what the running job does.
"""

import argparse
import http.client
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from api.core.access import keys  # noqa: E402
from api.core.db import database, migrate  # noqa: E402
from api.core.db.database import session_scope  # noqa: E402
from api.core.jobs import jobs  # noqa: E402
from api.core.jobs.jobs import Lease  # noqa: E402
from benchmarks.load_page import FAST, Found, Phase, Seen, page  # noqa: E402
from benchmarks.train_page import write_section  # noqa: E402
from lorainit.config.events import Metrics  # noqa: E402
from tests import servers  # noqa: E402
from tests.things import CHECKED, MODEL, a_file  # noqa: E402
from worker.job.progress import EventRecorder  # noqa: E402

JOBS = "/v1/fine_tuning/jobs"
PACES = {"20 steps a second, as a run": 20, FAST: None}
TURNS = 3
ARRIVAL_SECONDS = 1.0  # of a phase, in which everybody comes and fifty streams replay the story so far
SILENCE = 3.0  # seconds without an event after which a stream is left
RUN_SECONDS = 10  # of the run that goes as fast as it can, whose story has 200 points
TRIAL_SECONDS = 2.0


@dataclass(frozen=True)
class Door:
    """Where clients go, with which key, and what there is to look at; the first job is the running one."""

    address: str
    secret: str
    ids: Sequence[str]


def call(connection: http.client.HTTPConnection, door: Door, path: str, body: str | None = None) -> bytes:
    """One request; anything but 200 ends the benchmark."""
    head = {"authorization": f"Bearer {door.secret}", "content-type": "application/json"}
    connection.request("GET" if body is None else "POST", path, body, head)
    reply = connection.getresponse()
    content = reply.read()
    assert reply.status == 200, content
    return content


def look_on(door: Door, *, clients: int, seconds: float, pause: float) -> Seen:
    """Clients that look at jobs for a while; runs in a process of its own."""
    seen, until = Seen(), time.monotonic() + seconds

    began = time.monotonic()

    def timed(connection: http.client.HTTPConnection, path: str, took: list[float]) -> None:
        took = seen.arriving if time.monotonic() - began < ARRIVAL_SECONDS else took
        started = time.perf_counter()
        call(connection, door, path)
        took.append(time.perf_counter() - started)

    def client(number: int) -> None:
        connection = http.client.HTTPConnection(door.address, timeout=60)
        time.sleep(pause * number / clients)  # they do not all come at once
        for turn in itertools.count():
            job = door.ids[0 if turn % 2 else (number * 37 + turn) % len(door.ids)]
            timed(connection, f"{JOBS}/{job}", seen.polls)
            timed(connection, f"{JOBS}/{job}/events?limit=20", seen.events)
            if time.monotonic() > until:
                return
            time.sleep(pause)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    return seen


def follow_on(door: Door, *, clients: int, seconds: float, pause: float) -> Seen:
    """As many streams of the running job; in a process of its own, so that reading them delays no other client."""
    seen, until = Seen(), time.monotonic() + seconds

    def watch(number: int) -> int:
        time.sleep(pause * number / clients)
        return follow(door, seen.streams, until=until)

    with ThreadPoolExecutor(clients) as pool:
        seen.streamed = sum(pool.map(watch, range(clients)))
    return seen


def follow(door: Door, took: list[float], *, until: float) -> int:
    """Hold a stream of the running job; how many events came. One missing or double ends the benchmark."""
    connection = http.client.HTTPConnection(door.address, timeout=60)
    started, count = time.perf_counter(), 0
    connection.request("GET", f"{JOBS}/{door.ids[0]}/events/stream", headers={"authorization": f"Bearer {door.secret}"})
    reply = connection.getresponse()
    assert reply.status == 200, reply.read()
    connection.sock.settimeout(SILENCE)
    with closing(connection), suppress(TimeoutError):  # the worker has stopped for this time
        for line in reply:
            if line.startswith(b"data: "):
                took += [] if count else [time.perf_counter() - started]
                count += 1
                # The last field. Reading all of them would cost the clients more than the server.
                assert line.endswith(b'"sequence":%d}\n' % count), line
            if time.monotonic() > until:
                break
    return count


PARTS = {"api.server": "API", "postgres": "PostgreSQL", "worker.reconciler": "reconciler", "spawn_main": "clients"}


def used() -> Counter[str]:
    """Seconds of CPU so far, of this process and of each part of the benchmark that it has started."""
    spent = Counter({"worker": time.process_time()})
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended meanwhile
            command, times = " ".join(process.cmdline()), process.cpu_times()
            part = next((part for name, part in PARTS.items() if name in command), "others")
            spent[part] += times.user + times.system
    return spent


class Stub:
    """A worker whose run is only told."""

    def __init__(self, lease: Lease) -> None:
        self._recorder = EventRecorder(lease)
        self._step, self._total = 0, 10**6

    def try_out(self) -> None:
        """Find out how many steps a run has that goes as fast as it can for a while."""
        self._total = round(self.work(TRIAL_SECONDS, pace=None).pace * RUN_SECONDS)

    def work(self, seconds: float, *, pace: float | None) -> Phase:
        """Record steps for a while and write them when the worker would."""
        started, spent, first = time.monotonic(), used(), self._step
        while (passed := time.monotonic() - started) < seconds:
            wanted = self._step + 1 if pace is None else first + int(passed * pace)
            if self._step == wanted:
                time.sleep(0.02)
            while self._step < wanted:
                self._tell(self._total if pace is None else 4000)
            if self._recorder.is_due:
                self._recorder.flush()
        self._recorder.flush()
        passed, count = time.monotonic() - started, self._step - first
        more = used() - spent
        cores = {part: seconds / passed for part, seconds in more.items()}
        return Phase(count / passed, more["worker"] / count * 1e6, cores)

    def _tell(self, total: int) -> None:
        self._step += 1
        step = {"step": self._step, "total_steps": total, "tokens": 100 * self._step, "seconds": 0.05 * self._step}
        self._recorder.add(Metrics(**step, epoch=0.1, train_loss=2.0, learning_rate=1e-4, tokens_per_second=300.0))


@contextmanager
def service(folder: Path) -> Iterator[tuple[Door, str]]:
    """Everything but a worker: a door without jobs, and a checked file."""
    with servers.postgres() as server, servers.valkey() as broker:
        settings = {
            "LORAINIT_STATE_DIR": str(folder),
            "LORAINIT_DATABASE_URL": servers.new_database(server, "load"),
            "LORAINIT_BROKER_URL": broker,
            "LORAINIT_LOG_LEVEL": "warning",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        os.environ.update(settings)
        migrate.upgrade(database.get_engine())
        with session_scope() as session:
            project = keys.get_or_create_project(session, "load")
            _, secret = keys.create_key(session, project, name="load")
            file = a_file(session, project, validation=CHECKED).id
            session.commit()
        reconciler = servers.spawn([sys.executable, "-m", "worker.reconciler"], log=folder / "reconciler.log")
        try:
            with servers.web(settings, log=folder / "web.log") as address:
                yield Door(urlsplit(address).netloc, secret, []), file
        finally:
            servers.stopped(reconciler, servers.signal.SIGTERM)
            database.get_engine().dispose()


def submit(door: Door, file: str, count: int) -> list[str]:
    """Order `count` jobs over HTTP."""
    local, made = threading.local(), list[str]()

    def one(number: int) -> None:
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection(door.address, timeout=60)
        body = json.dumps({"model": MODEL, "training_file": file, "seed": number})
        made.append(json.loads(call(local.connection, door, JOBS, body))["id"])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(count)))
    return made


def claim() -> Lease:
    """The running job of the benchmark."""
    with session_scope() as session:
        (job,) = jobs.claim(session, "stub:1", lease_seconds=3600)
        session.commit()
    return Lease(job.id, job.lease_token)


def measure(given: argparse.Namespace) -> tuple[Seen, dict[str, Found]]:
    """The requests of clients that have the service for themselves, and what came of each pace."""
    found = {words: Found() for words in PACES}
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as name,
        service(Path(name)) as (door, file),
        ProcessPoolExecutor(2, spawn) as others,
    ):
        made = submit(door, file, given.jobs + 1)
        lease = claim()
        stub = Stub(lease)
        door = Door(door.address, door.secret, [lease.job_id, *made])
        crowd = {"clients": given.clients, "seconds": given.seconds + 1, "pause": given.pause}
        list(others.map(time.sleep, (0.5, 0.5)))  # both are started before the first phase
        stub.try_out()
        alone = others.submit(look_on, door, **crowd).result()
        for (words, pace), _ in itertools.product(PACES.items(), range(TURNS)):
            quiet = stub.work(given.seconds, pace=pace)
            people = [others.submit(what, door, **crowd) for what in (look_on, follow_on)]
            time.sleep(0.5)
            busy = stub.work(given.seconds, pace=pace)
            for one in people:
                found[words].seen += one.result()
            found[words].turns.append((quiet, busy))
    return alone, found


def main() -> None:
    """Print the figures, or write them into a page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--pause", type=float, default=0.5)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    load = os.getloadavg()[0]
    text = page(*measure(given), given, load)
    print(text)
    if given.write:
        write_section(given.write, "bench-load", text)


if __name__ == "__main__":
    main()
