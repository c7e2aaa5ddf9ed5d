"""An installation with jobs in it survives the newest migrations, there and back."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import sessionmaker

from api.core.db import database, migrate
from api.core.db.tables import Counter, Event, File, Job, JobLabel, StoragePeriod, Worker
from api.core.jobs import lookup
from benchmarks import queue_costs
from tests import servers
from tests.things import CHECKED, a_file, a_job, a_project, a_queued_job

FILE_RESULTS = "fine-tune-results"
GROUPED_JOBS = "1c7e5b0a94d3"  # the newest revision before the queue's
OPEN_OF_PROJECT = "6a1d84e0f7c3"  # the newest before jobs were found by their metadata
WATCHES = "9d3e6f10b8a2"  # the newest before columns and tables got plain names


@pytest.fixture(params=["sqlite", "postgresql"])
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Engine:
    """A database of its own."""
    if request.param == "sqlite":
        return database.make_engine(f"sqlite:///{tmp_path}/old.db")
    return database.make_engine(servers.new_database(request.getfixturevalue("postgres_server"), "old"))


def test_jobs_of_the_release_before_keep_their_order_and_their_events(
    environment: pytest.MonkeyPatch, old: Engine
) -> None:
    migrate.upgrade(old)
    with sessionmaker(old)() as session:
        project = a_project(session)
        queued = [a_queued_job(session, project, priority=priority).id for priority in (0, 2)]
        waiting = a_job(session, project).id
        session.commit()
    migrate.downgrade(old, GROUPED_JOBS)
    with old.connect() as connection:
        columns = list(connection.execute(text("SELECT * FROM jobs")).keys())
    assert "created_at" in columns and not {"turn", "priority_time"} & set(columns)
    migrate.upgrade(old)
    with sessionmaker(old)() as session:
        low, high, unchecked = (session.get_one(Job, job_id) for job_id in (*queued, waiting))
        assert low.priority_time == pytest.approx(low.created_at.timestamp(), abs=2)
        assert high.priority_time == pytest.approx(high.created_at.timestamp() - 7200, abs=2)
        assert (unchecked.priority_time, low.queue, low.lost_runs, low.pause_requested) == (None, "train", 0, False)
        assert session.query(Event).count() == 5
    assert migrate.find_drift(old) == []
    old.dispose()


def test_files_that_an_earlier_release_deleted_lose_what_it_left(environment: pytest.MonkeyPatch, old: Engine) -> None:
    migrate.upgrade(old)
    at = datetime(2026, 11, 1, tzinfo=UTC)
    with sessionmaker(old)() as session:
        project = a_project(session)
        ended = {"deleted_at": at, "cleared_at": at, "status_details": "line 3: 'secret' is not a key"}
        deleted, result = (a_file(session, project, purpose=name, **ended).id for name in ("fine-tune", FILE_RESULTS))
        kept = a_file(session, project).id
        session.commit()
    migrate.downgrade(old, "41c7be09d2f6")
    migrate.upgrade(old)
    with sessionmaker(old)() as session:
        gone = session.get_one(File, deleted)
        assert (gone.validation, gone.status_details, gone.cleared_at) == (None, None, None)
        assert session.get_one(File, kept).validation == CHECKED
        assert session.get_one(File, result).cleared_at == at
    old.dispose()


def test_jobs_of_the_release_before_are_found_by_their_metadata(environment: pytest.MonkeyPatch, old: Engine) -> None:
    migrate.upgrade(old)
    queue_costs.furnish(old, ended=1, projects=1, labelled=1100)  # more than a batch
    rows = select(JobLabel.digest, JobLabel.created_at, JobLabel.job_id)
    with sessionmaker(old)() as session:
        project = a_project(session)
        job, project_id = a_job(session, project, labels={"run": "7", "team": "ä"}).id, project.id
        a_job(session, project)
        before = set(session.execute(rows))
        session.commit()
    migrate.downgrade(old, OPEN_OF_PROJECT)
    migrate.upgrade(old)
    with sessionmaker(old)() as session:
        assert set(session.execute(rows)) == before
        found, _ = lookup.list_page(session, project_id, after=None, limit=10, metadata={"team": "ä", "run": "7"})
        assert [job.id for job in found] == [job]
    assert migrate.find_drift(old) == []
    old.dispose()


def test_columns_and_tables_with_new_names_keep_what_was_in_them(environment: pytest.MonkeyPatch, old: Engine) -> None:
    migrate.upgrade(old)
    at = datetime(2026, 11, 28, tzinfo=UTC)
    with sessionmaker(old)() as session:
        job = a_queued_job(session, a_project(session))
        job.priority_time, job.lost_runs, job.notified_at = 12.5, 2, at
        session.add(Counter(name="leases_lost", labels="{}", value=3.0))
        session.add(StoragePeriod(id="watch-1", since=at, until=at, token="a", next_token="b"))
        session.add(Worker(id="w", slots=1, queues=["train"], started_at=at, seen_at=at, problem="no GPU"))
        session.commit()
        job_id = job.id
    migrate.downgrade(old, WATCHES)
    queries = ("SELECT turn, losses FROM jobs", "SELECT value FROM tallies", "SELECT token FROM watches")
    with old.connect() as connection:
        assert [tuple(connection.execute(text(query)).one()) for query in queries] == [(12.5, 2), (3.0,), ("a",)]
        assert connection.scalar(text("SELECT trouble FROM workers")) == "no GPU"
    migrate.upgrade(old)
    with sessionmaker(old)() as session:
        job = session.get_one(Job, job_id)
        assert (job.priority_time, job.lost_runs, job.notified_at) == (12.5, 2, at)
        assert session.scalar(select(StoragePeriod.next_token)) == "b"
        assert session.get_one(Worker, "w").problem == "no GPU"
    assert migrate.find_drift(old) == []
    old.dispose()


def test_a_job_that_is_queued_needs_a_priority_time(environment: pytest.MonkeyPatch, old: Engine) -> None:
    migrate.upgrade(old)
    with sessionmaker(old)() as session:
        job = a_queued_job(session, a_project(session))
        job.priority_time = None
        with pytest.raises(IntegrityError, match="queued_has_a_priority_time"):
            session.flush()
    old.dispose()


def test_a_database_of_a_newer_release_is_refused_with_its_revision(old: Engine) -> None:
    migrate.upgrade(old)
    with old.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'ffffffffffff'"))
    for move in (migrate.upgrade, lambda engine: migrate.downgrade(engine, GROUPED_JOBS)):
        with pytest.raises(migrate.UnknownRevision, match=r"ffffffffffff.*newer"):
            move(old)
    old.dispose()


def test_a_revision_that_does_not_exist_is_refused_before_anything_is_undone(old: Engine) -> None:
    migrate.upgrade(old)
    with pytest.raises(migrate.UnknownRevision, match="'nothing'"):
        migrate.downgrade(old, "nothing")
    assert migrate.is_current(old)
    old.dispose()
