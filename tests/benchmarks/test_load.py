"""The load benchmark's page says what was measured; its stub worker writes through the worker's own code."""

import argparse

import pytest

from api.core.db.database import session_scope
from api.core.jobs import metrics
from benchmarks.load import Stub
from benchmarks.load_page import FAST, Found, Phase, Seen, page
from tests.things import a_project, a_running_job

GIVEN = argparse.Namespace(clients=2, jobs=3, pause=0.5, seconds=4.0)


def test_the_page_shows_what_was_measured_and_whether_the_goals_were_met() -> None:
    alone = Seen(polls=[0.010] * 100)
    seen = Seen(polls=[0.010] * 98 + [0.5] * 2, events=[0.002] * 100, streams=[0.03] * 100, streamed=7)
    run = Found(
        seen,
        [
            (Phase(20.0, 900.0, {"API": 0.1}), Phase(19.0, 800.0, {"API": 0.2})),
            (Phase(20.0, 900.0, {}), Phase(20.0, 800.0, {"worker": 0.5})),
        ],
    )
    fast = Found(Seen(polls=[0.010] * 50 + [0.05] * 50), [(Phase(9000.0, 40.0, {}), Phase(8600.0, 41.0, {}))])
    text = page(alone, {"as a run": run, FAST: fast}, GIVEN, 1.0)
    assert "| poll a job: nothing, and without streams | 10 ms | 10 ms | 1.0 | 100 |" in text
    assert "| poll a job: as a run | 10 ms | 500 ms | 50.0 | 100 |" in text
    assert "| its last 20 events: as a run | 2 ms | 2 ms | 1.0 | 100 |" in text
    assert "| a stream's first event: as a run | 30 ms | 30 ms | 1.0 | 100 |" in text
    assert "2 streams of the running job brought 7 events in all" in text
    assert "| as a run | 20.0 steps/s | 19.5 steps/s | 0.95, 1.00 | 900 µs and 800 µs |" in text
    assert "| as a run, with the clients | 0.10 | 0.25 | 0.35 |" in text
    assert "| p99 of polls at most 5 times their p50 | 1.67 | **met** |" in text
    assert "| the worker keeps at least 0.95 of its pace | 0.96 | **met** |" in text


def test_a_goal_that_was_missed_is_said_to_be() -> None:
    fast = Found(Seen(polls=[0.010] * 98 + [0.5] * 2), [(Phase(9000.0, 40.0, {}), Phase(8000.0, 41.0, {}))])
    assert page(Seen(), {FAST: fast}, GIVEN, 1.0).count("**missed**") == 2


@pytest.mark.usefixtures("service")
def test_every_step_the_stub_counts_is_in_the_database() -> None:
    with session_scope() as session:
        job, lease = a_running_job(session, a_project(session))
        session.commit()
    pace = Stub(lease).work(0.3, pace=None).pace
    with session_scope() as session:
        recorded = [row["step"] for row in metrics.read(session, job.id)]
    assert recorded == list(range(1, len(recorded) + 1))
    assert 0 < pace <= len(recorded) / 0.3
