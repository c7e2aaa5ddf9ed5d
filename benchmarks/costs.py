"""What recording and watching a run costs, in CPU milliseconds: a flush of the worker's, an event of a stream.

    python benchmarks/costs.py [--database sqlite|postgresql] [--streams 50] [--seconds 10] [--write PAGE]

A real server process. The flush is the worker's own code, in this process. A stream's cost is what the server
process spends while a job has twenty events a second, divided by the events that all streams brought.
"""

import argparse
import os
import selectors
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import create_connection, socket
from urllib.parse import urlsplit

import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from api.core.access import keys  # noqa: E402
from api.core.db import database, migrate  # noqa: E402
from api.core.db.database import now, session_scope  # noqa: E402
from api.core.jobs import events  # noqa: E402
from api.core.jobs.jobs import Lease  # noqa: E402
from api.core.settings import get_settings  # noqa: E402
from benchmarks.train_page import write_section  # noqa: E402
from lorainit.config.events import Metrics  # noqa: E402
from tests import servers  # noqa: E402
from tests.things import a_running_job  # noqa: E402
from worker.job.progress import EventRecorder  # noqa: E402

STEPS, FLUSHES, WARM = 100, 10, 2
RATE = 20  # events a second
KINDS = ("sqlite", "postgresql")


@dataclass(frozen=True)
class Costs:
    """CPU milliseconds on one kind of database."""

    flush: float  # of 100 steps with an event each, in the worker's process
    delivered: float  # one event of one stream, in the server's process
    quiet: float  # a second of one stream of a job that says nothing, in the server's process


def measure(kind: str, *, streams: int, seconds: float) -> Costs:
    """All of it on an empty database of this kind."""
    with ExitStack() as exits:
        folder = Path(exits.enter_context(tempfile.TemporaryDirectory()))
        settings = {"LORAINIT_STATE_DIR": str(folder), "LORAINIT_LOG_LEVEL": "warning", "PYTHONPATH": str(ROOT)}
        settings["LORAINIT_DATABASE_URL"] = (
            f"sqlite:///{folder}/costs.db"
            if kind == "sqlite"
            else servers.new_database(exits.enter_context(servers.postgres()), "costs")
        )
        exits.enter_context(in_effect(settings))
        flush = cost_of_a_flush(a_run()[0])
        run, secret = a_run()
        address = exits.enter_context(servers.web(settings, log=folder / "web.log"))
        return Costs(flush, *cost_of_streams(address, secret, run.job_id, streams=streams, seconds=seconds))


@contextmanager
def in_effect(settings: dict[str, str]) -> Iterator[None]:
    """These settings for this process, and a database that is ready."""
    os.environ.update(settings)
    get_settings.cache_clear()
    for made in (database.get_engine, database.get_reader, database.get_sessions):
        made.cache_clear()
    migrate.upgrade(database.get_engine())
    yield
    database.get_engine().dispose()
    database.get_reader().dispose()


def a_run() -> tuple[Lease, str]:
    """A running job, and a key to look at it."""
    with session_scope() as session:
        project = keys.get_or_create_project(session, "costs")
        _, secret = keys.create_key(session, project, name="costs")
        _, lease = a_running_job(session, project)
        session.commit()
    return lease, secret


def cost_of_a_flush(lease: Lease) -> float:
    """Milliseconds of CPU of this process, the median of some."""
    recorder, took = EventRecorder(lease), list[float]()
    for number in range(1, STEPS * (FLUSHES + WARM) + 1):
        step = {"step": number, "total_steps": 200, "tokens": 100 * number, "seconds": 0.05 * number}
        recorder.add(Metrics(**step, epoch=0.1, train_loss=2.0, learning_rate=1e-4, tokens_per_second=300.0))
        if number % STEPS == 0:
            started = time.process_time()
            recorder.flush()
            took.append(time.process_time() - started)
    return statistics.median(took[WARM:]) * 1000


def cost_of_streams(address: str, secret: str, job_id: str, *, streams: int, seconds: float) -> tuple[float, float]:
    """Milliseconds of the server's CPU for an event of one stream, and for a second of a quiet one."""
    (server,) = [one for one in psutil.Process().children() if "api.server" in one.cmdline()]
    with followed(address, secret, job_id, streams) as seen:
        time.sleep(2)  # the story so far
        before, had = spent(server), sum(seen)
        for number in range(round(RATE * seconds)):
            tell(job_id, f"event {number}")
            time.sleep(1 / RATE)
        time.sleep(2)
        after, count = spent(server), sum(seen) - had
        assert count == streams * round(RATE * seconds), f"{count} events came"
        time.sleep(seconds)
        return (after - before) * 1000 / count, (spent(server) - after) * 1000 / (streams * seconds)


def spent(process: psutil.Process) -> float:
    """Seconds of CPU so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


def tell(job_id: str, text: str) -> None:
    """One event of a size that metrics have."""
    numbers = {"step": 1, "total_steps": 200, "epoch": 0.1, "tokens": 100, "train_loss": 2.0, "learning_rate": 1e-4}
    with session_scope() as session:
        events.append(session, job_id, text, at=now(session), data=numbers)
        session.commit()


@contextmanager
def followed(address: str, secret: str, job_id: str, count: int) -> Iterator[list[int]]:
    """Streams of a job that a thread reads; how many events each has brought."""
    where, closing = urlsplit(address), threading.Event()
    seen, ends = [0] * count, [b""] * count
    head = (
        f"GET /v1/fine_tuning/jobs/{job_id}/events/stream HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {secret}\r\n\r\n"
    )

    def read() -> None:
        while not closing.is_set():
            for key, _ in selector.select(0.2):
                one: socket = key.fileobj
                text = ends[key.data] + one.recv(1 << 20)
                seen[key.data] += text.count(b"\n\n")  # each event ends with one
                ends[key.data] = text[-1:]

    with ExitStack() as exits, selectors.DefaultSelector() as selector:
        for number in range(count):
            connection = exits.enter_context(create_connection((where.hostname, where.port)))
            connection.sendall(head.encode())
            selector.register(connection, selectors.EVENT_READ, number)
        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield seen
        finally:
            closing.set()
            reader.join()


def table(found: dict[str, Costs], streams: int) -> str:
    """The figures as Markdown."""
    rows = [
        (f"a flush of {STEPS} steps with an event each, of the worker", [f"{one.flush:.1f}" for one in found.values()]),
        (f"an event of one of {streams} streams, of the API", [f"{one.delivered:.3f}" for one in found.values()]),
        (f"a second of a quiet one of {streams} streams, of the API", [f"{one.quiet:.3f}" for one in found.values()]),
    ]
    head = [f"| CPU ms | {' | '.join(found)} |", "|---" * (1 + len(found)) + "|"]
    return "\n".join([*head, *(f"| {what} | {' | '.join(figures)} |" for what, figures in rows)])


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--database", choices=KINDS, action="append")
    parser.add_argument("--streams", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    kinds = given.database or KINDS
    found = {kind: measure(kind, streams=given.streams, seconds=given.seconds) for kind in kinds}
    text = table(found, given.streams)
    print(text)
    if given.write:
        write_section(given.write, "costs", text)


if __name__ == "__main__":
    main()
