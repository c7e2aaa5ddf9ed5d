"""Requests per second and latency of submitting and polling jobs, on this machine, over real HTTP.

    python benchmarks/api.py [--database sqlite|postgresql] [--threads 8] [--jobs 1000] [--polls 4000]

A real server process, keep-alive connections, no worker: what is measured is the web process and
its database. Client and server share the machine's cores.
"""

import argparse
import http.client
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from sqlalchemy.orm import Session

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from api.core import db, keys, migrate  # noqa: E402
from api.core.models import File  # noqa: E402
from tests import servers  # noqa: E402
from tests.things import CHECKED, MODEL, a_file  # noqa: E402

JOBS = "/v1/fine_tuning/jobs"


@contextmanager
def database(kind: str, folder: Path) -> Iterator[str]:
    """An empty database of this kind."""
    if kind == "sqlite":
        yield f"sqlite:///{folder}/bench.db"
    else:
        with servers.postgres() as server:
            yield servers.new_database(server, "bench")


def prepare(url: str) -> tuple[str, str]:
    """A key and a checked file."""
    engine = db.make_engine(url)
    migrate.upgrade(engine)
    with Session(engine) as session:
        project = keys.get_or_create_project(session, "bench")
        _, secret = keys.create_key(session, project, name="bench")
        file: File = a_file(session, project, validation=CHECKED)
        session.commit()
        name = file.id
    engine.dispose()
    return secret, name


def measure(address: str, threads: int, count: int, send: Callable[[http.client.HTTPConnection, int], None]) -> str:
    """`count` requests from `threads` threads; one line of figures."""
    local, took = threading.local(), list[float]()

    def one(number: int) -> None:
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection(address, timeout=60)
        started = time.perf_counter()
        send(local.connection, number)
        took.append(time.perf_counter() - started)

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, range(count)))
    seconds = time.perf_counter() - started
    cuts = statistics.quantiles(took, n=100)
    return f"{count / seconds:7.0f} requests/s   p50 {cuts[49] * 1000:6.1f} ms   p99 {cuts[98] * 1000:6.1f} ms"


def bench(kind: str, *, threads: int, jobs: int, polls: int) -> None:
    """Submit jobs, then look at them."""
    with tempfile.TemporaryDirectory() as name, database(kind, Path(name)) as url:
        secret, file = prepare(url)
        head = {"authorization": f"Bearer {secret}", "content-type": "application/json"}
        made: list[str] = []

        def call(connection: http.client.HTTPConnection, verb: str, path: str, body: str | None = None) -> bytes:
            connection.request(verb, path, body, head)
            reply = connection.getresponse()
            content = reply.read()
            assert reply.status == 200, content
            return content

        def submit(connection: http.client.HTTPConnection, number: int) -> None:
            body = json.dumps({"model": MODEL, "training_file": file, "seed": number})
            made.append(json.loads(call(connection, "POST", JOBS, body))["id"])

        def poll(connection: http.client.HTTPConnection, number: int) -> None:
            call(connection, "GET", f"{JOBS}/{made[number % len(made)]}")

        settings = {"LORAINIT_STATE_DIR": name, "LORAINIT_DATABASE_URL": url, "LORAINIT_LOG_LEVEL": "warning"}
        with servers.web({**settings, "PYTHONPATH": str(ROOT)}, log=Path(name) / "web.log") as address:
            where = urlsplit(address).netloc
            print(f"{kind:10} submit {measure(where, threads, jobs, submit)}")
            print(f"{kind:10} poll   {measure(where, threads, polls, poll)}")


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--database", choices=["sqlite", "postgresql"], action="append")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--polls", type=int, default=4000)
    given = parser.parse_args()
    print(f"{given.threads} client threads, {os.cpu_count()} cores shared by client, server and database")
    for kind in given.database or ["sqlite", "postgresql"]:
        bench(kind, threads=given.threads, jobs=given.jobs, polls=given.polls)


if __name__ == "__main__":
    main()
