"""How both databases find the rows of what is asked all the time, among twenty thousand jobs: never by reading all."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event, select
from sqlalchemy.orm import Session

from api.core.db import database, migrate
from api.core.db.tables import File, Job
from api.core.files import files
from api.core.jobs import events, jobs, lookup, metrics, pauses
from api.core.jobs.jobs import Lease
from api.core.models import registry
from api.core.queue import scheduling
from api.core.settings import Settings
from api.http import event_poller
from benchmarks import queue_costs
from tests import servers

LARGE = ("jobs", "events", "metrics", "job_labels")
SCAN = re.compile(rf"SCAN ({'|'.join(LARGE)})(_\d+)?( USING .*)?")


@dataclass(frozen=True)
class Things:
    """What is asked for, found beforehand."""

    queued: Job
    ended: Job
    lease: Lease
    file: File


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def crowded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A database of its own with many ended and many queued jobs."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path_factory.mktemp('crowded')}/test.db"
    else:
        url = servers.new_database(request.getfixturevalue("postgres_server"), "crowded")
    engine = database.make_engine(url)
    migrate.upgrade(engine)
    queue_costs.furnish(engine, ended=18_000, projects=20, labelled=2000)
    queue_costs.line_up(engine, start=0, end=2000)
    yield engine
    engine.dispose()


def look(session: Session) -> Things:
    with session.begin_nested():
        queued, running, ended = (
            session.scalars(select(Job).where(Job.status == status).limit(1)).one()
            for status in ("queued", "running", "succeeded")
        )
        file = session.scalars(select(File).limit(1)).one()
        return Things(queued, ended, Lease(running.id, running.lease_token), file)


ASKED: Mapping[str, Callable[[Session, Things], object]] = {
    **{name: lambda session, _, ask=ask: ask(session) for name, ask in queue_costs.HOT.items()},
    "a job by its id": lambda session, it: lookup.load_view(
        session, lookup.find(session, it.queued.project_id, it.queued.id)
    ),
    "a job and the key that asks for it": lambda session, it: session.execute(
        lookup.KEY_AND_JOB, {"key": "key_0", "job": it.queued.id}
    ),
    "all models of a project": lambda session, it: registry.list_page(
        session, it.queued.project_id, after=None, limit=1000, search=""
    ),
    "models that are searched for": lambda session, it: registry.list_page(
        session, it.queued.project_id, after=None, limit=20, search="x"
    ),
    "a page of jobs": lambda session, it: lookup.list_page(session, it.queued.project_id, after=None, limit=20),
    "a further page of jobs with a pair": lambda session, it: lookup.list_page(
        session, queue_costs.SEARCHED, after="ftjob-l9", limit=20, metadata={"team": "a"}
    ),
    "a page of events": lambda session, it: events.list_page(session, it.lease.job_id, after=None, limit=20),
    "events after one": lambda session, it: events.list_since(session, it.ended.id, 0, limit=200),
    "what streams have not sent": lambda session, it: event_poller.find_news(
        session, [event_poller.StreamPosition(job.id, -1, "key_0") for job in (it.ended, it.queued)]
    ),
    "the numbers of a flush": lambda session, it: metrics.save_steps(
        session, it.lease.job_id, it.lease.token, [(1, {}), (2, {})], at=it.queued.created_at
    ),
    "the events of a flush": lambda session, it: events.append_all(
        session, it.lease.job_id, [events.EventDraft("one"), events.EventDraft("two")], at=it.queued.created_at
    ),
    "a run's numbers": lambda session, it: list(metrics.read(session, it.ended.id)),
    "numbers beyond a checkpoint": lambda session, it: metrics.delete_after(session, it.ended.id, 1),
    "a lease is renewed": lambda session, it: jobs.renew_lease(session, it.lease, lease_seconds=30),
    "is a run asked to pause?": lambda session, it: pauses.is_pause_requested(session, it.lease),
    "may a project order one more?": lambda session, it: scheduling.require_queue_quota(session, it.queued.project_id),
    "may a project run one more?": lambda session, it: scheduling.count_startable(
        session, it.queued.project_id, wanted=1
    ),
    "who uses a file?": lambda session, it: files.describe_use(session, it.file),
}


@pytest.mark.parametrize("limit", [0, 3])
@pytest.mark.parametrize("name", ASKED)
def test_what_is_asked_all_the_time_reads_no_table_whole(
    crowded: Engine, name: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(project_running=limit, project_queued=1_000_000 if limit else 0)
    monkeypatch.setattr("api.core.queue.scheduling.get_settings", lambda: settings)
    monkeypatch.setattr("api.core.queue.notify.get_settings", lambda: settings)
    faults: list[str] = []
    with crowded.connect() as connection, Session(connection) as session:
        things = look(session)
        for statement, given in heard(connection, lambda: ASKED[name](session, things)):
            faults += [f"{what} for {statement}" for what in read_whole(connection, statement, given)]
    assert faults == []


@pytest.mark.parametrize("statement", ["SELECT * FROM jobs", "SELECT count(*) FROM events JOIN jobs USING (id)"])
def test_a_statement_that_reads_a_table_whole_is_noticed(crowded: Engine, statement: str) -> None:
    with crowded.connect() as connection:
        assert read_whole(connection, statement, {})


def heard(connection: Connection, ask: Callable[[], object]) -> list[tuple[str, Any]]:
    """The statements that were run meanwhile, as the driver got them."""
    found: list[tuple[str, Any]] = []

    def listen(_: object, __: object, statement: str, given: Any, ___: object, is_many: bool) -> None:
        found.append((statement, given[0] if is_many else given))

    event.listen(connection, "before_cursor_execute", listen)
    ask()
    event.remove(connection, "before_cursor_execute", listen)
    return found


def read_whole(connection: Connection, statement: str, given: Any) -> list[str]:
    """What the database's plan for a statement reads from end to end: large tables, and indexes of all their rows."""
    if not statement.startswith(("SELECT", "WITH", "INSERT", "UPDATE", "DELETE")):
        return []
    if connection.dialect.name == "sqlite":
        rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", given).all()
        return [row.detail for row in rows if SCAN.fullmatch(row.detail) and not _is_partial(row.detail)]
    (plan,) = connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {statement}", given).scalar_one()
    scans = (node for node in _nodes(plan["Plan"]) if node["Node Type"] == "Seq Scan")
    return [node["Relation Name"] for node in scans if node["Relation Name"] in LARGE]


def _is_partial(detail: str) -> bool:
    partial = (index.name for index in Job.metadata.tables["jobs"].indexes if index.dialect_kwargs)
    return any(detail.endswith(f"INDEX {name}") for name in partial)


def _nodes(plan: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield plan
    for below in plan.get("Plans", ()):
        yield from _nodes(below)
