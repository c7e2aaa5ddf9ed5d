"""The commands that print what the queue costs: their database is as they say, and so are their tables."""

import argparse
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from api.core.db.tables import Event, Job, Metric
from benchmarks import queue_costs, queue_times


@pytest.fixture(scope="module")
def filled() -> Iterator[Engine]:
    with queue_costs.database("sqlite") as engine:
        queue_costs.furnish(engine, ended=30, projects=5)
        queue_costs.line_up(engine, start=0, end=10)
        queue_costs.line_up(engine, start=10, end=25)
        yield engine


def test_so_many_jobs_wait_and_have_ended_as_asked_for(filled: Engine) -> None:
    with Session(filled) as session:
        counts = dict(session.execute(select(Job.status, func.count()).group_by(Job.status)).all())
        assert (counts["queued"], counts["running"]) == (25, 5)
        assert counts["succeeded"] == session.scalar(select(func.count()).select_from(Metric)) == 31
        assert (session.scalar(select(func.count()).select_from(Event)) or 0) > 31
        assert session.scalar(select(func.count(Job.project_id.distinct())).where(Job.status == "queued")) == 5


def test_a_cost_is_milliseconds_and_leaves_nothing_behind(filled: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_costs, "ENOUGH_CALLS", 2)
    milliseconds = queue_costs.cost(filled, queue_costs.HOT["a worker claims a job"])
    assert 0 < milliseconds < 10_000
    with Session(filled) as session:
        assert session.scalar(select(func.count()).where(Job.status == "queued")) == 25


def test_the_page_has_a_column_for_each_size_and_a_row_for_each_question() -> None:
    given = argparse.Namespace(queued=[10, 1000], ended=5, projects=2, labelled=3)
    text = queue_costs.page({"SQLite": {"a claim": [1.0, 2.5]}}, given)
    assert "| SQLite | 10 queued | 1,000 queued |" in text
    assert "| a claim | 1.00 | 2.50 |" in text


def test_the_page_of_times_adds_up_what_an_idle_service_costs() -> None:
    times = queue_times.Times(waits={"a file": [0.1, 0.3, 0.2]}, idle={"API": 0.002, "worker": 0.001})
    assert "| a file | SQLite | 0.200 | 0.300 | 3 |" in queue_times.waits_page({"SQLite": times})
    assert "| **all** | 0.30 |" in queue_times.idle_page({"SQLite": times})
