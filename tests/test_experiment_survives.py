"""An experiment of 24 jobs through kill -9, a broker that forgets everything, and a restart of the whole service.

Its table is the one of an undisturbed experiment, bit for bit. PostgreSQL, Valkey and real runs on a tiny random base.
"""

import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from openai.types.fine_tuning import FineTuningJob

from api.core.access import keys
from api.core.db import database as db
from api.core.db import migrate
from api.core.db.database import session_scope
from tests import servers
from tests.conftest import forget
from tests.stack import FINAL, PATIENCE, Stack, children_of, wait_for, words_of
from tests.test_job_path import running

GRID = {"init": ["kaiming", "loram", "pissa", "eva"], "learning_rates": [1e-3, 1e-2], "seeds": [1, 2, 3]}
COSTS = ("cost", "job_ids", "to_baseline_loss", "valid_loss")  # they hold seconds or ids, which differ between any two


@pytest.fixture
def service(
    monkeypatch: pytest.MonkeyPatch, postgres_server: str, tiny_base: Path, tmp_path: Path
) -> Iterator[tuple[str, str]]:
    """Settings of a service that can be started again and again: an API key, and the broker's address."""
    with ExitStack() as exits:
        broker = exits.enter_context(servers.valkey())
        for name, value in {
            "LORAINIT_STATE_DIR": str(tmp_path),
            "LORAINIT_DATABASE_URL": servers.new_database(postgres_server, "experiment"),
            "LORAINIT_BROKER_URL": broker,
            "LORAINIT_CATALOGUE": str(tiny_base / "catalogue.toml"),
            "LORAINIT_REQUESTS_PER_MINUTE": "60000",
            "LORAINIT_LEASE_SECONDS": "15",
        }.items():
            monkeypatch.setenv(name, value)
        forget()
        exits.callback(forget)
        migrate.upgrade(db.get_engine())
        with session_scope() as session:
            _, secret = keys.create_key(session, keys.get_or_create_project(session, "lab"), name="t")
            session.commit()
        yield secret, broker


def order(stack: Stack, training: str, validation: str) -> str:
    recipe = {"n_epochs": 2, "batch_size": 8, "checkpoint_interval": 1}
    job = {
        "model": "tiny",
        "training_file": training,
        "validation_file": validation,
        "method": {"type": "supervised", "supervised": {"hyperparameters": recipe}},
        "lora": {"r": 4},
        "resources": {"group": False},  # cells in one forward pass are equal up to rounding only
    }
    made: Any = stack.client.post("/experiments", cast_to=object, body={"name": "n", "job": job, "grid": GRID})
    return str(made["id"])


def read(stack: Stack, experiment_id: str) -> dict[str, Any]:
    found: Any = stack.client.get(f"/experiments/{experiment_id}", cast_to=object)
    return dict(found)


def wait(stack: Stack, experiment_id: str, *, succeeded: int) -> dict[str, Any]:
    deadline = time.monotonic() + 4 * PATIENCE
    while (shown := read(stack, experiment_id))["job_counts"]["succeeded"] < succeeded or (
        succeeded == 24 and shown["status"] not in FINAL
    ):
        assert time.monotonic() < deadline and not shown["job_counts"]["failed"], stack.log("worker")
        time.sleep(0.2)
    return shown


def list_jobs(stack: Stack, experiment_id: str) -> list[FineTuningJob]:
    return list(stack.client.fine_tuning.jobs.list(limit=100, metadata={"experiment_id": experiment_id}))


def find_running(stack: Stack, experiment_id: str) -> list[str]:
    """Running jobs whose process is there; that of an ended job stays for a moment."""
    processes = [" ".join(words_of(child)) for child in children_of(stack.processes["worker"])]
    running = [job.id for job in list_jobs(stack, experiment_id) if job.status == "running"]
    return [job_id for job_id in running if any(job_id in words for words in processes)]


def kill(process: subprocess.Popen[bytes]) -> None:
    """As if the machine had failed: the process and all below it, so that no run can end what it has begun."""
    first = psutil.Process(process.pid)
    for one in (first, *first.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


def table(shown: dict[str, Any]) -> dict[str, Any]:
    rows = [{name: value for name, value in row.items() if name not in COSTS} for row in shown["results"]]
    losses = [row["valid_loss"][name] for row in shown["results"] for name in ("final", "best")]
    return {"rows": rows, "losses": losses, "noise": shown["card"]["noise"], "same": shown["card"]["same"]}


@pytest.mark.slow
def test_a_killed_worker_a_wiped_broker_and_a_restart_change_no_number(
    service: tuple[str, str], tmp_path: Path
) -> None:
    secret, broker = service
    logs = tmp_path / "logs"
    logs.mkdir()
    with running(secret, logs) as stack:
        files = stack.upload(24), stack.upload(4)
        undisturbed = wait(stack, order(stack, *files), succeeded=24)
        disturbed = order(stack, *files)
        wait(stack, disturbed, succeeded=3)
        wait_for(lambda: find_running(stack, disturbed))
        kill(stack.processes["worker"])
        stack.start_worker()
        wait(stack, disturbed, succeeded=8)
        with redis.Redis.from_url(broker) as server:
            server.flushall()
        wait(stack, disturbed, succeeded=14)
        wait_for(lambda: find_running(stack, disturbed))
        for process in stack.processes.values():
            kill(process)
    with running(secret, logs) as stack:
        shown = wait(stack, disturbed, succeeded=24)
        lost = [
            job.id
            for job in list_jobs(stack, disturbed)
            if any("worker was lost" in text for text in stack.messages(job.id))
        ]
    assert shown["status"] == undisturbed["status"] == "succeeded"
    assert table(shown) == table(undisturbed)
    assert lost, "neither the kill nor the restart met a run"
    print(f"{len(lost)} of 24 runs were lost and done again")
