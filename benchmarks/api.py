"""What requests cost the web process, beside a bare FastAPI route with one SELECT by primary key in the same run.

    python benchmarks/api.py [--database sqlite postgresql] [--polls 1500] [--rounds 3] [--models 100000]
                             [--write docs/operations.md]

Real server processes, real HTTP, no worker. Both routes are served by one uvicorn process with the same settings, and
take turns. A cost is milliseconds of a processor in the web process, which a busy machine changes less than it
changes seconds; the database's own are not in it. Client, web process and database share the machine's cores.
"""

import argparse
import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from sqlalchemy import Engine, inspect, select, text
from sqlalchemy.orm import Session, sessionmaker

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from api.core.access import keys  # noqa: E402
from api.core.db import database, migrate  # noqa: E402
from api.core.db.tables import File, Job, Project  # noqa: E402
from benchmarks import queue_costs  # noqa: E402
from benchmarks.api_client import MIB, THREADS, ask, get, post  # noqa: E402
from benchmarks.api_page import BARE, LIST, POLL, Cost, Found, Whole, page  # noqa: E402
from benchmarks.train_page import write_section  # noqa: E402
from tests import servers  # noqa: E402
from tests.things import MODEL, a_file  # noqa: E402

JOBS, MODELS = "/v1/fine_tuning/jobs", "/v1/models"
QUEUED = 300


@dataclass(frozen=True)
class Server:
    """A web process."""

    process: psutil.Process
    port: int

    def cpu(self) -> float:
        """Seconds of a processor since it started."""
        spent = self.process.cpu_times()
        return float(spent.user + spent.system)


@dataclass(frozen=True)
class Things:
    """What is asked for: a key of a project, ids of its queued jobs, of one that runs, and of a checked file."""

    secret: str
    queued: Sequence[str]
    running: str
    file: str


# --- servers and what is in them -----------------------------------------------------------------


@contextmanager
def serving(command: Sequence[str], port: int, log: Path, **settings: str) -> Iterator[Server]:
    """A web process until the block ends."""
    process = servers.spawn([sys.executable, *command], log=log, env={**os.environ, **settings})
    try:
        servers.wait_for(lambda: servers.listening(port), process, log)
        yield Server(psutil.Process(process.pid), port)
    finally:
        servers.stopped(process, servers.signal.SIGTERM)


def furnish(engine: Engine, *, models: int) -> Things:
    """A project with `models` models and `QUEUED` jobs in the queue."""
    migrate.upgrade(engine)
    queue_costs.furnish(engine, ended=models, projects=1)
    queue_costs.line_up(engine, start=0, end=QUEUED)
    with sessionmaker(engine, expire_on_commit=False)() as session:
        project = session.scalars(select(Project)).one()
        _, secret = keys.create_key(session, project, name="bench")
        file = a_file(session, project)
        train(session, file)
        queued = session.scalars(select(Job.id).where(Job.status == "queued")).all()
        running = session.scalars(select(Job.id).where(Job.status == "running")).one()
        session.execute(text("ANALYZE"))
        session.commit()
    return Things(secret, queued, running, file.id)


def train(session: Session, file: File) -> None:
    """An adapter for each job that has succeeded, with a copy of `file`."""
    columns = [column.name for column in inspect(File).local_table.columns]
    own = {"id": "'file-' || jobs.id", "storage_key": "'adapters/' || jobs.id"}
    values = ", ".join(own.get(name, f"files.{name}") for name in columns)
    copies = f"SELECT {values} FROM files, jobs WHERE jobs.status = 'succeeded' AND files.id = :file"
    session.execute(text(f"INSERT INTO files ({', '.join(columns)}) {copies}"), {"file": file.id})
    named = f"'ft:{MODEL}:local::' || id, 'file-' || id, 16, created_at"
    adapters = f"SELECT id, project_id, {named} FROM jobs WHERE status = 'succeeded'"
    session.execute(text(f"INSERT INTO adapters (job_id, project_id, name, file_id, rank, created_at) {adapters}"))


# --- what is measured -----------------------------------------------------------------------------


def cost(server: Server, requests: Sequence[bytes]) -> Cost:
    """What these requests cost; some were sent before, so that nothing is done for the first time."""
    spent = server.cpu()
    took, wall = ask(server.port, requests)
    return Cost(1000 * (server.cpu() - spent) / len(requests), took, wall)


def median(costs: Sequence[Cost]) -> Cost:
    """The round in the middle, by its processor's time."""
    return sorted(costs, key=lambda one: one.cpu)[len(costs) // 2]


def whole_list(server: Server, secret: str, models: int) -> Whole:
    """Ask for all models, and look at the memory of the web process before and at its height."""
    Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")  # the height is measured from here on
    before, spent, started = _memory(server, "VmRSS"), server.cpu(), time.perf_counter()
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}{MODELS}", headers={"authorization": f"Bearer {secret}"}
    )
    with urllib.request.urlopen(request) as reply:
        size = sum(map(len, iter(lambda: reply.read(MIB), b"")))
    seconds, cpu = time.perf_counter() - started, server.cpu() - spent
    return Whole(models, size / 1e6, seconds, cpu, _memory(server, "VmHWM") - before)


def _memory(server: Server, name: str) -> float:
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


# --- one kind of database ------------------------------------------------------------------------


def measure(kind: str, *, polls: int, rounds: int, models: int) -> Found:
    """All figures of one kind of database."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = f"sqlite:///{folder}/bench.db"
        if kind != "sqlite":
            url = servers.new_database(stack.enter_context(servers.postgres()), "bench")
        engine = database.make_engine(url)
        things = furnish(engine, models=models)
        engine.dispose()
        bare, ours = stack.enter_context(both(url, folder))
        asked = {name: (ours, requests) for name, requests in what_is_asked(things, polls).items()}
        asked = {BARE: (bare, [get(f"/jobs/{things.queued[n % QUEUED]}") for n in range(polls)]), **asked}
        for server, requests in asked.values():
            ask(server.port, requests[: 10 * THREADS])
        turns = [{name: cost(*one) for name, one in asked.items()} for _ in range(rounds)]
        costs = {name: median([turn[name] for turn in turns]) for name in asked}
        return Found(kind, costs, whole_list(ours, things.secret, models))


@contextmanager
def both(url: str, folder: Path) -> Iterator[tuple[Server, Server]]:
    """The bare route's process and ours, at the same database."""
    ports = servers.free_port(), servers.free_port()
    settings = {"LORAINIT_STATE_DIR": str(folder), "LORAINIT_DATABASE_URL": url, "PYTHONPATH": str(ROOT)}
    settings |= {"LORAINIT_PORT": str(ports[1]), "LORAINIT_HOST": "127.0.0.1"}
    bare = [str(ROOT / "benchmarks/bare_route.py"), url, str(ports[0])]
    with (
        serving(bare, ports[0], folder / "bare.log") as one,
        serving(["-m", "api.server"], ports[1], folder / "web.log", **settings) as other,
    ):
        yield one, other


def what_is_asked(things: Things, polls: int) -> dict[str, list[bytes]]:
    """The requests of one round by their names; what costs more is asked more rarely."""
    secret, few = things.secret, range(polls // 15)
    order = {"model": MODEL, "training_file": things.file}
    return {
        POLL: [get(f"{JOBS}/{things.queued[n % QUEUED]}", secret) for n in range(polls)],
        "a poll of a running job": [get(f"{JOBS}/{things.running}", secret) for _ in range(polls)],
        LIST: [get(f"{JOBS}?limit=100", secret) for _ in few],
        "a page of 100 models": [get(f"{MODELS}?limit=100", secret) for _ in few],
        "an order": [post(JOBS, secret, {**order, "seed": n}) for n in few],
    }


def main() -> None:
    """Print the figures, or write them into a page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--database", nargs="+", choices=["sqlite", "postgresql"], default=["sqlite", "postgresql"])
    parser.add_argument("--polls", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", type=int, default=100_000)
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    busy = os.getloadavg()[0]
    found = [measure(kind, polls=given.polls, rounds=given.rounds, models=given.models) for kind in given.database]
    text = page(found, busy=(busy, os.getloadavg()[0]))
    print(text)
    if given.write:
        write_section(given.write, "bench-api", text)


if __name__ == "__main__":
    main()
