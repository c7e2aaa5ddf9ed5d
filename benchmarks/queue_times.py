"""How long an order waits for its claim while a worker is free, and what the service costs while nobody asks it.

    python benchmarks/queue_times.py [--databases SQLite PostgreSQL] [--orders 10] [--seconds 60] [--write PAGE]

A real `lorainit serve`: web process, reconciler, worker, Valkey and the parent of these. Orders name a file whose rows
have been checked, or one that was uploaded a moment before; times are the database's, from the job's first event to the
one of its claim, and each job is cancelled then. The idle service is watched first: seconds of CPU over seconds. With
`--orders 0` that is all.
"""

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import openai
import psutil
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from api.core.access import keys  # noqa: E402
from api.core.db import database, migrate  # noqa: E402
from api.core.db.tables import Event  # noqa: E402
from benchmarks.train_page import write_section  # noqa: E402
from tests import servers  # noqa: E402
from tests.things import MODEL  # noqa: E402

PARTS = {
    "api.cli": "parent of the others",
    "api.server": "API",
    "worker.reconciler": "reconciler",
    "celery": "worker",
    "valkey": "Valkey",
    "postgres": "PostgreSQL",
}
SETTLED = 0.02  # of a core: every process has done what it does at its start
LONGEST_START = 240.0
LONGEST_WAIT = 60.0


@dataclass
class Times:
    """Seconds from orders to claims by kind of file, and the share of a core that each part takes while idle."""

    waits: dict[str, list[float]] = field(default_factory=dict)
    idle: dict[str, float] = field(default_factory=dict)


@contextmanager
def service(kind: str) -> Iterator[tuple[openai.OpenAI, Engine]]:
    """Everything up on an empty database of this kind, with a client."""
    with ExitStack() as exits:
        folder = Path(exits.enter_context(tempfile.TemporaryDirectory()))
        url = f"sqlite:///{folder}/times.db"
        if kind == "postgresql":
            url = servers.new_database(exits.enter_context(servers.postgres()), "times")
        engine = database.make_engine(url)
        exits.callback(engine.dispose)
        migrate.upgrade(engine)
        with Session(engine) as session:
            _, secret = keys.create_key(session, keys.get_or_create_project(session, "lab"), name="bench")
            session.commit()
        os.environ.update({"LORAINIT_DATABASE_URL": url, "LORAINIT_STATE_DIR": str(folder)})
        port, log = servers.free_port(), folder / "serve.log"
        process = servers.spawn([sys.executable, "-m", "api.cli", "serve", "--port", str(port)], log=log)
        exits.callback(servers.stopped, process, servers.signal.SIGTERM, patience=30)
        servers.wait_for(lambda: "is ready" in log.read_text(), process, log)
        settle()
        reader = database.make_engine(url, read_only=True)  # another engine's look would keep writers waiting on SQLite
        exits.callback(reader.dispose)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=secret), reader


def settle() -> None:
    """Wait until the service has nothing left to load."""
    deadline = time.monotonic() + LONGEST_START
    time.sleep(10)
    while sum(idle(5).values()) > SETTLED and time.monotonic() < deadline:
        pass


def idle(seconds: float) -> dict[str, float]:
    """The share of a core that each part of the service takes."""
    before = _used()
    started = time.monotonic()
    time.sleep(seconds)
    passed, after = time.monotonic() - started, _used()
    return {part: (after[part] - before.get(part, 0.0)) / passed for part in sorted(after)}


def _used() -> dict[str, float]:
    """Seconds of a processor by part, of everything below this process."""
    used: dict[str, float] = {}
    for child in psutil.Process().children(recursive=True):
        command, times = " ".join(child.cmdline()), child.cpu_times()
        part = next(name for word, name in PARTS.items() if word in command)
        used[part] = used.get(part, 0.0) + times.user + times.system
    return used


def wait_for_claim(client: openai.OpenAI, engine: Engine, file_id: str) -> float:
    """Order a job; seconds from its first event to its claim. When this returns its worker is free again."""
    job = client.fine_tuning.jobs.create(model=MODEL, training_file=file_id)
    deadline = time.monotonic() + LONGEST_WAIT
    while (claimed := _told(engine, job.id, "running")) is None:
        assert time.monotonic() < deadline, "no worker took the job"
        time.sleep(0.02)
    client.fine_tuning.jobs.cancel(job.id)
    time.sleep(5)  # a worker kills its run and is free again
    ordered = _told(engine, job.id, "validating_files")
    assert ordered is not None
    return claimed - ordered


def _told(engine: Engine, job_id: str, status: str) -> float | None:
    """When the job was told to have got that status."""
    with Session(engine) as session:
        story = session.scalars(select(Event).where(Event.job_id == job_id))
        return next((event.created_at.timestamp() for event in story if event.data.get("status") == status), None)


def upload(client: openai.OpenAI, name: str) -> str:
    """A file of sixteen rows."""
    row = {"messages": [{"role": "user", "content": f"Who is {name}?"}, {"role": "assistant", "content": "A file."}]}
    content = io.BytesIO((json.dumps(row) + "\n").encode() * 16)
    return client.files.create(file=("rows.jsonl", content), purpose="fine-tune").id


def waits(client: openai.OpenAI, engine: Engine, orders: int) -> dict[str, list[float]]:
    """Seconds from so many orders to their claims, by kind of file."""
    checked = upload(client, "checked")
    while client.files.retrieve(checked).status == "uploaded":
        time.sleep(0.1)
    wait_for_claim(client, engine, checked)  # not counted: with their first order, API and worker load what they need
    return {
        "a file that is checked": [wait_for_claim(client, engine, checked) for _ in range(orders)],
        "a file uploaded a moment before": [
            wait_for_claim(client, engine, upload(client, f"new {number}")) for number in range(orders)
        ],
    }


def measure(kind: str, given: argparse.Namespace) -> Times:
    """Watch, then order."""
    found = Times()
    with service(kind) as (client, engine):
        found.idle = idle(given.seconds)
        if given.orders:
            found.waits = waits(client, engine, given.orders)
    return found


def waits_page(times: Mapping[str, Times]) -> str:
    """How long orders wait, for the documentation."""
    text = _load() + "| seconds from an order to its claim | | median | most | orders |\n|---|---|---:|---:|---:|\n"
    for kind, found in times.items():
        for what, seconds in found.waits.items():
            figures = f"{statistics.median(seconds):.3f} | {max(seconds):.3f} | {len(seconds)}"
            text += f"| {what} | {kind} | {figures} |\n"
    return text


def idle_page(times: Mapping[str, Times]) -> str:
    """What an idle service costs, for the documentation."""
    text = _load() + "| % of a core while idle | " + " | ".join(times) + " |\n|---|" + "---:|" * len(times) + "\n"
    parts = sorted({part for found in times.values() for part in found.idle})
    rows = {part: [found.idle.get(part, 0.0) for found in times.values()] for part in parts}
    rows["**all**"] = [sum(found.idle.values()) for found in times.values()]
    return text + "".join(
        f"| {part} | " + " | ".join(f"{100 * share:.2f}" for share in shares) + " |\n" for part, shares in rows.items()
    )


def _load() -> str:
    return f"Load average of the machine's two cores at the end: {os.getloadavg()[0]:.1f}.\n\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--databases", nargs="+", choices=["SQLite", "PostgreSQL"], default=["SQLite", "PostgreSQL"])
    parser.add_argument("--orders", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--write", type=Path)
    given = parser.parse_args(arguments)
    times = {kind: measure(kind.lower(), given) for kind in given.databases}
    sections = {"idle": idle_page(times)} | ({"queue-times": waits_page(times)} if given.orders else {})
    for name, text in sections.items():
        print(text)
        if given.write:
            write_section(given.write, name, text)


if __name__ == "__main__":
    main()
