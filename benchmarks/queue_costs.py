"""What the queue's statements cost a processor with few and with many jobs, on both databases.

    python benchmarks/queue_costs.py [--queued 10 1000 100000] [--ended 1000000] [--projects 50] [--labelled 100000]
                                     [--write PAGE]

Real SQLite and PostgreSQL through the real migrations. `ended` jobs have ended, each with an event, a step's
numbers and a result file; of the others `queued` wait in one queue, and every fifth project runs one. One more
project has jobs with metadata: a pair that all of them share, and one that is each one's own. A cost is
milliseconds of a processor for one call, this process and the database's together: the mean of many calls.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

from sqlalchemy import Connection, Engine, insert, inspect, select, text
from sqlalchemy.orm import Session, sessionmaker

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from api.core.db import database as db  # noqa: E402
from api.core.db import migrate  # noqa: E402
from api.core.db.tables import Job, JobLabel, Project  # noqa: E402
from api.core.jobs import admission, jobs, labels, lookup, metrics  # noqa: E402
from api.core.maintenance import pending  # noqa: E402
from api.core.monitoring import gauges  # noqa: E402
from api.core.queue import notify, positions  # noqa: E402
from benchmarks.train_page import write_section  # noqa: E402
from tests import servers  # noqa: E402
from tests.things import a_file, a_job, a_project, a_queued_job, a_running_job, a_worker  # noqa: E402

ENOUGH_SECONDS, ENOUGH_CALLS = 0.5, 200
SEARCHED = "proj_searched"

# What is asked again and again, by whom there is a queue for.
HOT: Mapping[str, Callable[[Session], object]] = {
    "a worker claims a job": lambda session: jobs.claim(session, "bench", lease_seconds=30),
    "the places of the first hundred": positions.read_order,
    "the reconciler looks for work": lambda session: pending.find_pending(session.connection()),
    "jobs without a notification": notify.find_unannounced,
    "jobs whose message was lost": lambda session: notify.find_lost(session, older_than=timedelta(seconds=15)),
    "jobs of silent workers": lambda session: jobs.recover_lost_runs(session, max_attempts=3),
    "jobs whose files are checked": admission.find_ready,
    "ended jobs without a result file": metrics.find_without_csv,
    "the figures of /metrics": gauges.take_snapshot,
    "jobs with a pair that all have": lambda session: search(session, team="a"),
    "jobs with a pair that one has": lambda session: search(session, run="7"),
    "jobs with a pair that none has": lambda session: search(session, team="b"),
    "jobs with both of two pairs": lambda session: search(session, team="a", run="7"),
    "jobs without metadata": lambda session: lookup.list_page(session, SEARCHED, after=None, limit=20, unlabelled=True),
}


def search(session: Session, **pairs: str) -> object:
    """A page of the jobs that have all these pairs."""
    return lookup.list_page(session, SEARCHED, after=None, limit=20, metadata=pairs)


def furnish(engine: Engine, *, ended: int, projects: int, labelled: int = 0) -> None:
    """A migrated database's projects, workers and jobs that have ended; some run and some wait for their files."""
    with sessionmaker(engine)() as session:
        _take_time(session.connection())
        crowd = [a_project(session) for _ in range(projects)]
        for project in crowd[:: max(1, projects // 10)]:
            running, _ = a_running_job(session, project)
            running.lease_until = running.created_at + timedelta(days=1)
            a_job(session, project, file=a_file(session, project, status="uploaded"))
        a_worker(session, slots=projects)
        done = a_job(session, crowd[0], result_file_id=a_file(session, crowd[0]).id)
        done.status, done.finished_at = "succeeded", done.created_at
        session.flush()
        _copy(session.connection(), done.id, "e", 0, ended)
        told = "id, job_id, sequence, created_at, level, type, message, data"
        story = "SELECT 'ftevent-' || id, id, 1, created_at, 'info', 'message', '', '{}' FROM jobs"
        copies = "WHERE status = 'succeeded' AND id <> :job_id"
        session.execute(text(f"INSERT INTO events ({told}) {story} {copies}"), {"job_id": done.id})
        kept = 'job_id, step, lease_token, created_at, "values"'
        copied = "SELECT id, 1, 1, created_at, '{}' FROM jobs WHERE status = 'succeeded'"
        session.execute(text(f"INSERT INTO metrics ({kept}) {copied}"))
        if labelled:
            _label(session, done.id, labelled)
        session.commit()
    _analyze(engine)


def line_up(engine: Engine, *, start: int, end: int) -> None:
    """Jobs of all projects that wait, numbered from `start` to before `end`; workers were notified of them long ago."""
    with sessionmaker(engine)() as session:
        _take_time(session.connection())
        one = a_queued_job(session, session.scalars(select(Project).order_by(Project.id)).first())
        one.notified_at = one.created_at - timedelta(hours=1)
        session.flush()
        _copy(session.connection(), one.id, "q", start, end - 1)
        session.commit()
    _analyze(engine)


def _label(session: Session, job_id: str, jobs: int) -> None:
    """A project of jobs with metadata, copies of one that has none."""
    session.add(Project(id=SEARCHED, name=SEARCHED, created_at=db.now(session)))
    session.flush()
    build = "json_object" if session.get_bind().dialect.name == "sqlite" else "jsonb_build_object"
    own = {"project_id": f"'{SEARCHED}'", "metadata": f"{build}('team', 'a', 'run', CAST(n AS text))"}
    _copy(session.connection(), job_id, "l", 0, jobs, **own)
    found = session.execute(select(Job.id, Job.created_at, Job.labels).where(Job.project_id == SEARCHED)).all()
    rows = [
        {"digest": labels.compute_digest(SEARCHED, *pair), "created_at": at, "job_id": job_id}
        for job_id, at, pairs in found
        for pair in pairs.items()
    ]
    session.execute(insert(JobLabel), rows)


def _copy(connection: Connection, job_id: str, prefix: str, start: int, end: int, **changes: str) -> None:
    """Copies of a job, dealt out to all projects, each entering the queue after the one before it.

    Args:
        changes: SQL of what columns hold instead; `n` is a copy's number.
    """
    numbers = "generate_series(:start + 1, :end) AS n"
    if connection.dialect.name == "sqlite":
        counted = "SELECT :start + 1 AS n WHERE :start < :end UNION ALL SELECT n + 1 FROM r WHERE n < :end"
        numbers = f"(WITH RECURSIVE r AS ({counted}) SELECT n FROM r)"
    own = {
        "id": f"'ftjob-{prefix}' || n",
        "project_id": "(SELECT id FROM dealt WHERE dealt.number = n % (SELECT count(*) FROM dealt))",
        "priority_time": "priority_time + n * 0.001",
        **changes,
    }
    columns = [column.name for column in inspect(Job).local_table.columns]
    names, values = (", ".join(words) for words in (map(_quoted, columns), (own.get(c, _quoted(c)) for c in columns)))
    dealt = "WITH dealt AS (SELECT id, row_number() OVER (ORDER BY id) - 1 AS number FROM projects)"
    statement = f"INSERT INTO jobs ({names}) {dealt} SELECT {values} FROM jobs, {numbers} WHERE id = :job_id"
    connection.execute(text(statement), {"start": start, "end": end, "job_id": job_id})


def _quoted(name: str) -> str:
    return f'"{name}"'


def _take_time(connection: Connection) -> None:
    """Statements of this connection may take longer than the service's, which have a minute."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SET statement_timeout = 0"))


def _analyze(engine: Engine) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        _take_time(connection)
        connection.execute(text("ANALYZE" if engine.dialect.name == "sqlite" else "VACUUM ANALYZE"))


@contextmanager
def database(kind: str) -> Iterator[Engine]:
    """A migrated database of this kind; it goes with the block."""
    with tempfile.TemporaryDirectory() as folder:
        if kind == "sqlite":
            yield from _migrated(f"sqlite:///{folder}/queue.db")
        else:
            with servers.postgres() as server:
                yield from _migrated(servers.new_database(server, "queue"))


def _migrated(url: str) -> Iterator[Engine]:
    engine = db.make_engine(url)
    migrate.upgrade(engine)
    yield engine
    engine.dispose()


def cost(engine: Engine, ask: Callable[[Session], object]) -> float:
    """Milliseconds of a processor for one call. What it writes is rolled back."""
    with engine.connect() as connection:
        server = None
        if engine.dialect.name == "postgresql":
            server = int(connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())
        connection.rollback()
        spent, calls = 0.0, 0
        for warm in (False, True):
            begun = _used(server)
            while spent < ENOUGH_SECONDS and calls < ENOUGH_CALLS:
                with Session(connection) as session:
                    ask(session)
                spent, calls = _used(server) - begun, calls + 1
                if not warm:
                    spent, calls = 0.0, 0
                    break
    return 1e3 * spent / calls


def _used(server: int | None) -> float:
    """Seconds of a processor that this process and its server process have used."""
    mine = time.process_time()
    if server is None:
        return mine
    fields = Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()
    return mine + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def page(costs: Mapping[str, Mapping[str, Sequence[float]]], given: argparse.Namespace) -> str:
    """The section for the documentation: a table for each database, a column for each number of queued jobs."""
    sizes = " | ".join(f"{size:,} queued" for size in given.queued)
    text = (
        f"{given.ended:,} jobs have ended; they and those that wait are of {given.projects} projects."
        f" {given.labelled:,} more, of one project, have metadata. Milliseconds.\n"
    )
    for kind, rows in costs.items():
        text += f"\n| {kind} | {sizes} |\n|---|{'---:|' * len(given.queued)}\n"
        text += "".join(f"| {name} | {' | '.join(f'{ms:.2f}' for ms in row)} |\n" for name, row in rows.items())
    return text


def measure(kind: str, given: argparse.Namespace) -> Mapping[str, Sequence[float]]:
    """Milliseconds by what is asked, in the order of the sizes."""
    found: dict[str, list[float]] = {name: [] for name in HOT}
    with database(kind) as engine:
        furnish(engine, ended=given.ended, projects=given.projects, labelled=given.labelled)
        for there, size in pairwise([0, *given.queued]):
            line_up(engine, start=there, end=size)
            for name, ask in HOT.items():
                found[name].append(cost(engine, ask))
                print(f"{kind}, {size:,} queued, {name}: {found[name][-1]:.2f} ms", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--databases", nargs="+", choices=["SQLite", "PostgreSQL"], default=["SQLite", "PostgreSQL"])
    parser.add_argument("--queued", nargs="+", type=int, default=[10, 1000, 100_000])
    parser.add_argument("--ended", type=int, default=1_000_000)
    parser.add_argument("--projects", type=int, default=50)
    parser.add_argument("--labelled", type=int, default=100_000)
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    text = page({kind: measure(kind.lower(), given) for kind in given.databases}, given)
    print(text)
    if given.write:
        write_section(given.write, "queue-costs", text)


if __name__ == "__main__":
    main()
