"""One thing goes wrong at a time, and how long it takes until it is right again.

Bounds are those that are promised, with the seconds that a busy machine needs to start a process.
"""

import signal
import threading
import time
from contextlib import suppress

import httpx2
import pytest
from redis import Redis

from api.core.queue.workers import FRESH
from tests.chaos.clients import stub_orders
from tests.chaos.conftest import Town
from tests.chaos.fleet import LEASE_SECONDS
from tests.promises import within
from worker.reconciler import NOTIFY_AGAIN_AFTER

START_SECONDS = 15.0
CANCEL_SECONDS = 5.0


def test_a_dead_workers_job_goes_on_after_its_lease_and_not_before(town: Town) -> None:
    job = town.order(steps=200, seed=1)
    town.until(lambda: len(town.lines(job)) > 30, seconds=300)
    for worker in town.fleet.parents("worker"):
        worker.kill()
    killed = time.monotonic()
    town.until(lambda: {token for _, token in town.lines(job)} == {1, 2}, seconds=300)
    last = max(at for at, token in town.lines(job) if token == 1)
    again = min(at for at, token in town.lines(job) if token == 2)
    assert last < killed + within(0.5), "its trainer outlived it"
    assert LEASE_SECONDS * 0.5 < again - killed < within(LEASE_SECONDS + START_SECONDS)
    town.until(lambda: town.status(job) == "succeeded", seconds=300)


def test_a_message_that_the_broker_forgot_is_sent_again(town: Town) -> None:
    busy = [town.order(steps=120, seed=seed) for seed in range(10, 14)]
    town.until(lambda: [town.status(one) for one in busy] == ["running"] * 4, seconds=300)
    job = town.order(steps=10, seed=2)
    notified = "SELECT 1 FROM jobs WHERE notified_at IS NOT NULL AND status = 'queued'"
    town.until(lambda: town.ledger.rows(notified), seconds=300)
    with Redis.from_url(town.fleet.valkey.url) as client:
        client.flushall()
    patience = NOTIFY_AGAIN_AFTER.total_seconds() + 120 * 0.05 + START_SECONDS
    town.until(lambda: town.status(job) == "succeeded", seconds=within(patience + FRESH.total_seconds()))


def test_without_a_broker_jobs_are_accepted_and_run_when_it_is_back(town: Town) -> None:
    town.fleet.valkey.stop(signal.SIGKILL)
    try:
        job = town.order(steps=10, seed=3)
    finally:
        town.fleet.valkey.start()
    town.until(
        lambda: town.status(job) == "succeeded", seconds=within(NOTIFY_AGAIN_AFTER.total_seconds() + START_SECONDS)
    )


def test_without_a_database_a_run_stops_itself_before_its_lease_ends(town: Town) -> None:
    job = town.order(steps=400, seed=4)
    town.until(lambda: len(town.lines(job)) > 30, seconds=300)
    down, postgres = time.monotonic(), town.fleet.postgres
    assert postgres is not None
    postgres.stop(signal.SIGQUIT)
    try:
        time.sleep(LEASE_SECONDS + 1)
        reply = town.client.get(f"/fine_tuning/jobs/{job}")
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_ready")
        assert max(at for at, _ in town.lines(job)) < down + LEASE_SECONDS
        assert not town.fleet.trainers()
    finally:
        postgres.start()
    town.until(lambda: 2 in {token for _, token in town.lines(job)}, seconds=300)
    assert town.client.post(f"/fine_tuning/jobs/{job}/cancel").json()["status"] == "cancelled"


def test_cancel_ends_the_training_process_within_five_seconds(town: Town) -> None:
    job = town.order(steps=1000, seed=5)
    town.until(lambda: len(town.lines(job)) > 5, seconds=300)
    town.client.post(f"/fine_tuning/jobs/{job}/cancel")
    cancelled = time.monotonic()
    town.until(lambda: not town.fleet.trainers(), seconds=within(CANCEL_SECONDS))
    assert town.lines(job)[-1][0] < cancelled + within(CANCEL_SECONDS)


@pytest.mark.parametrize("moments", [(0.01, 0.02), pytest.param((0.0, 0.01, 0.02, 0.03), marks=pytest.mark.slow)])
def test_an_order_repeated_through_kill_9_of_the_web_process_is_one_job(town: Town, moments: tuple[float, ...]) -> None:
    seed, once = 6 + len(moments), f"once-{len(moments)}"
    body = {**next(stub_orders(seed=seed, steps=(10, 10))), "training_file": town.file}
    answers: set[str] = set()
    for moment in moments:
        killer = threading.Timer(moment, lambda: [one.kill() for one in town.fleet.parents("api")])
        killer.start()
        with suppress(httpx2.HTTPError):
            headers = {"idempotency-key": once}
            answers.add(town.client.post("/fine_tuning/jobs", json=body, headers=headers).json()["id"])
        killer.join()
        town.until(town.fleet.is_up, seconds=300)
    answers.add(town.client.post("/fine_tuning/jobs", json=body, headers=headers).json()["id"])
    assert len(answers) == 1
    assert len(town.ledger.rows(f"SELECT id FROM jobs WHERE seed = {body['seed']}")) == 1
