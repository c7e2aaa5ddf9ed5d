"""An installation with jobs in it survives the newest migrations, there and back."""

from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import Engine, text
from sqlalchemy.orm import sessionmaker

from api.core import db, migrate
from api.core.models import Event, Job
from tests import servers
from tests.things import a_job, a_project, a_queued_job

GROUPED_JOBS = "1c7e5b0a94d3"  # the newest revision before the queue's


@pytest.fixture(params=["sqlite", "postgresql"])
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Engine:
    """A database of its own."""
    if request.param == "sqlite":
        return db.make_engine(f"sqlite:///{tmp_path}/old.db")
    return db.make_engine(servers.new_database(request.getfixturevalue("postgres_server"), "old"))


def back(engine: Engine, revision: str) -> None:
    config = migrate._config()
    with engine.connect() as connection, migrate._tables_replaceable(connection), connection.begin():
        config.attributes["connection"] = connection
        command.downgrade(config, revision)


def test_jobs_of_the_release_before_keep_their_order_and_their_events(
    environment: pytest.MonkeyPatch, old: Engine
) -> None:
    migrate.upgrade(old)
    with sessionmaker(old)() as session:
        project = a_project(session)
        queued = [a_queued_job(session, project, priority=priority).id for priority in (0, 2)]
        waiting = a_job(session, project).id
        session.commit()
    back(old, GROUPED_JOBS)
    with old.connect() as connection:
        columns = list(connection.execute(text("SELECT * FROM jobs")).keys())
    assert "created_at" in columns and "turn" not in columns
    migrate.upgrade(old)
    with sessionmaker(old)() as session:
        low, high, unchecked = (session.get_one(Job, job_id) for job_id in (*queued, waiting))
        assert low.turn == pytest.approx(low.created_at.timestamp(), abs=2)
        assert high.turn == pytest.approx(high.created_at.timestamp() - 7200, abs=2)
        assert (unchecked.turn, low.queue, low.losses, low.pause_requested) == (None, "train", 0, False)
        assert session.query(Event).count() == 5
    assert migrate.drift(old) == []
    old.dispose()
