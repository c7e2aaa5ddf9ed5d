"""Pause and resume over HTTP: OpenAI's routes, the states a caller sees, and what is refused."""

from typing import Any

import pytest
from sqlalchemy.orm import Session

from api.core.db.tables import Job
from api.core.jobs import jobs
from api.core.jobs.jobs import Lease
from api.core.queue import queue
from api.core.settings import get_settings
from tests import stub_worker
from tests.api.conftest import JOBS, Lab, mark, refused
from tests.things import MODEL

pytestmark = pytest.mark.one_database


def post(lab: Lab, job: dict[str, Any], verb: str) -> Any:
    return lab.client.post(f"{JOBS}/{job['id']}/{verb}", headers={"content-type": "application/json"})


def a_queued_order(lab: Lab, **fields: Any) -> dict[str, Any]:
    job = lab.order(**fields)
    stub_worker.tidy()
    return job


def test_a_queued_job_is_paused_and_resumed_and_each_again(lab: Lab) -> None:
    job = a_queued_order(lab)
    told = [post(lab, job, verb).json()["status"] for verb in ("pause", "pause", "resume", "resume")]
    assert told == ["paused", "paused", "queued", "queued"]


def test_workers_are_notified_of_a_resumed_job(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    job = a_queued_order(lab)
    post(lab, job, "pause")
    notified: list[tuple[str, str]] = []
    monkeypatch.setattr(queue, "notify_workers", lambda *job: notified.append(job))
    post(lab, job, "resume")
    assert notified == [(job["id"], "train")]


def test_a_running_job_is_pausing_then_paused_and_says_so(lab: Lab, session: Session) -> None:
    job = a_queued_order(lab)
    taken = stub_worker.claim()
    assert taken is not None
    shown = post(lab, job, "pause").json()
    assert (shown["status"], shown["resume"]["reason"]) == ("pausing", "the job is pausing")
    refused(post(lab, job, "resume"), 400, "invalid_job_state")
    jobs.release(session, Lease(job["id"], taken[1].token), "Stopped")
    shown = lab.client.get(f"{JOBS}/{job['id']}").json()
    assert shown["status"] == "paused"
    assert shown["resume"] == {"possible": True, "from_step": None, "reason": None}
    assert (shown["queue_position"], shown["queue_reason"], shown["finished_at"]) == (None, None, None)


def test_an_ended_job_is_neither_paused_nor_resumed(lab: Lab) -> None:
    job = lab.order()
    stub_worker.run_all()
    for verb in ("pause", "resume"):
        assert "already succeeded" in refused(post(lab, job, verb), 400, "invalid_job_state")["message"]


def test_a_failed_job_that_cannot_be_resumed_says_why_in_the_job_and_in_the_refusal(lab: Lab) -> None:
    job = lab.order(metadata={"stub": "fail"})
    stub_worker.run_all()
    reason = "there is no checkpoint to go on from"
    assert lab.client.get(f"{JOBS}/{job['id']}").json()["resume"]["reason"] == reason
    assert reason in refused(post(lab, job, "resume"), 400, "job_not_resumable")["message"]


def test_a_strangers_job_is_not_found(lab: Lab, stranger: Lab) -> None:
    job = lab.order()
    for verb in ("pause", "resume"):
        refused(post(stranger, job, verb), 404, "fine_tune_not_found", "fine_tune_id")


def test_one_job_too_many_is_refused_once_and_for_now(
    lab: Lab, session: Session, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("LORAINIT_PROJECT_QUEUED", "1")
    get_settings.cache_clear()
    file = lab.upload()["id"]
    mark(session, file)
    lab.order(file)
    reply = lab.client.post(JOBS, json={"model": MODEL, "training_file": file, "suffix": "second"})
    assert refused(reply, 429, "queue_full")["type"] == "insufficient_quota"
    assert reply.headers["x-should-retry"] == "false"
    assert session.query(Job).count() == 1


def test_a_job_asks_for_a_device_and_shows_it(lab: Lab, session: Session) -> None:
    job = lab.order(resources={"device": "gpu"})
    assert job["resources"]["device"] == "gpu"
    assert session.get_one(Job, job["id"]).queue == "gpu"


@pytest.mark.parametrize("device", ["", "GPU", "a b", "cuda:0", "x" * 33, 1])
def test_a_device_that_no_queue_could_be_called_is_refused(lab: Lab, device: object) -> None:
    file = lab.upload()["id"]
    reply = lab.client.post(JOBS, json={"model": MODEL, "training_file": file, "resources": {"device": device}})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "resources.device"
