"""The load benchmark's page says what was measured; its stub worker writes through the worker's own code."""

import argparse

import pytest

from api.core import metrics
from api.core.db import session_scope
from benchmarks.load import Seen, Stub, page
from tests.things import a_project, a_running_job

GIVEN = argparse.Namespace(clients=2, jobs=3, pause=0.5, seconds=4.0)


def test_the_page_shows_the_99th_percentile_and_the_ratio_of_each_turn() -> None:
    seen = Seen(polls=[0.010] * 98 + [0.5] * 2, events=[0.002] * 100, streams=[0.03] * 100, streamed=7)
    text = page(GIVEN, seen, {"as a run": [(20.0, 19.0), (20.0, 20.0)]})
    assert "| poll a job | 10 ms | 500 ms | 100 |" in text
    assert "| its last 20 events | 2 ms | 2 ms | 100 |" in text
    assert "| a stream's first event | 30 ms | 30 ms | 100 |" in text
    assert "2 streams of the running job brought 7 events in all" in text
    assert "| as a run | 20.0 steps/s | 19.5 steps/s | 0.95, 1.00 |" in text


@pytest.mark.usefixtures("service")
def test_every_step_the_stub_counts_is_in_the_database() -> None:
    with session_scope() as session:
        job, lease = a_running_job(session, a_project(session))
        session.commit()
    pace = Stub(lease).work(0.3, pace=None)
    with session_scope() as session:
        recorded = [row["step"] for row in metrics.read(session, job.id)]
    assert recorded == list(range(1, len(recorded) + 1))
    assert 0 < pace <= len(recorded) / 0.3
