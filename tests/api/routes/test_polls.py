"""The request that clients repeat until a job has ended: cheap, and otherwise like every other."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import event, select, text
from sqlalchemy.orm import Session

from api.core.access import keys
from api.core.db import database
from api.core.db.tables import Job
from api.core.queue import positions
from tests import stub_worker
from tests.api.conftest import JOBS, Lab, refused
from tests.things import a_project, a_queued_job, a_running_job


@pytest.fixture
def selects(session: Session, environment: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The statements that read; what is known of the queue counts for a minute."""
    environment.setattr(positions, "MAX_AGE_SECONDS", 60.0)
    seen: list[str] = []

    def look(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        seen.extend([statement] if statement.startswith("SELECT") else [])

    event.listen(session.get_bind(), "before_cursor_execute", look)
    yield seen
    event.remove(session.get_bind(), "before_cursor_execute", look)


def poll(lab: Lab, job_id: str, **headers: str) -> Any:
    return lab.client.get(f"{JOBS}/{job_id}", headers=headers)


def test_a_poll_of_a_queued_or_running_job_is_one_statement(lab: Lab, session: Session, selects: list[str]) -> None:
    running, _ = a_running_job(session, lab.project)
    queued = a_queued_job(session, lab.project)
    assert poll(lab, queued.id).json()["queue_position"] == 1  # the queue is ranked once for everybody
    for job in (queued, running):
        selects.clear()
        assert poll(lab, job.id).json()["status"] == job.status
        assert len(selects) == 1


def test_a_look_at_the_events_of_a_job_is_two_statements(lab: Lab, session: Session, selects: list[str]) -> None:
    job, _ = a_running_job(session, lab.project)
    selects.clear()
    assert len(lab.client.get(f"{JOBS}/{job.id}/events").json()["data"]) == 3
    assert len(selects) == 2


def test_a_key_of_any_other_request_is_one_statement(lab: Lab, selects: list[str]) -> None:
    lab.client.get("/v1/lora/methods")
    assert len(selects) == 1


def test_a_poll_says_what_the_order_and_the_list_say(lab: Lab) -> None:
    ordered = lab.order(metadata={"a": "ä"})
    assert poll(lab, ordered["id"]).json() == ordered
    stub_worker.run_all()
    done = poll(lab, ordered["id"])
    assert done.json()["adapter"] is not None and done.headers["content-type"] == "application/json"
    assert lab.client.get(JOBS).json()["data"] == [done.json()]
    assert lab.client.post(f"{JOBS}/{ordered['id']}/cancel").status_code == 400


@pytest.mark.parametrize("job_id", ["ftjob-unknown", "ftjob-\N{SNOWMAN}", "a%0Ab"])
def test_a_job_that_is_not_there_is_a_404(lab: Lab, job_id: str) -> None:
    refused(poll(lab, job_id), 404, "fine_tune_not_found", "fine_tune_id")


def test_who_asks_comes_before_what_is_asked_for(lab: Lab) -> None:
    for job_id in ("ftjob-unknown", "%00"):
        refused(poll(lab, job_id, authorization="Bearer sk-lorainit-0-1"), 401, "invalid_api_key")
        refused(poll(lab, job_id, authorization=""), 401, "missing_api_key")


def test_a_foreign_job_is_not_there(lab: Lab, stranger: Lab) -> None:
    refused(poll(stranger, lab.order()["id"]), 404, "fine_tune_not_found", "fine_tune_id")


def test_a_key_is_no_good_for_polls_once_it_is_deleted_or_has_expired(lab: Lab, session: Session) -> None:
    job = a_queued_job(session, lab.project)
    soon = datetime.now(UTC) + timedelta(hours=1)
    for change in ({"deleted_at": datetime.now(UTC)}, {"expires_at": soon - timedelta(hours=2)}):
        key, secret = keys.create_key(session, lab.project, name="mine", expires_at=soon)
        session.commit()
        headers = {"authorization": f"Bearer {secret}"}
        assert poll(lab, job.id, **headers).status_code == 200
        for name, value in change.items():
            setattr(key, name, value)
        session.commit()
        refused(poll(lab, job.id, **headers), 401, "invalid_api_key")


def test_a_poll_for_another_project_of_this_server_is_refused(lab: Lab, stranger: Lab) -> None:
    headers = {"openai-project": stranger.project.id}
    refused(poll(lab, lab.order()["id"], **headers), 401, "mismatched_project")


def test_a_database_that_dropped_its_connections_is_asked_again(service: None) -> None:
    with database.session_scope() as session:
        job = a_queued_job(session, a_project(session))
        session.commit()
    query = select(Job.status).where(Job.id == job.id)
    assert database.find_row(query, {}) == ("queued",)
    with database.session_scope() as session:
        if session.get_bind().dialect.name == "postgresql":
            others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            assert session.scalar(text(f"SELECT count(pg_terminate_backend(pid)) {others}"))
    assert database.find_row(query, {}) == ("queued",)
