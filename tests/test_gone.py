"""Deleted is gone: a word is planted in training rows, and after the deletion it is nowhere that the service writes.

A real run of a tiny base, around it the service's own pieces: API, file check, recorder, artifacts, chores, sweeps.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from sqlalchemy import select
from sqlalchemy.engine import make_url
from starlette.testclient import TestClient

from api.app import create_app
from api.core.access import keys
from api.core.db import database
from api.core.db.database import session_scope
from api.core.db.tables import Job
from api.core.files.storage import get_storage
from api.core.jobs.jobs import Lease
from api.core.maintenance import redaction
from api.core.settings import get_settings
from lorainit.config.events import Checkpoint, Done, Event, Failed
from lorainit.config.spec import BaseModelRef, RunSpec
from lorainit.run import run
from tests import stub_worker
from tests.lorainit.conftest import bases, chat, make_tokenizer, tokenizer
from tests.promises import within
from tests.stack import Stack
from tests.test_job_path import folder, stack, started
from tests.things import MODEL
from worker.host import caches, scratch
from worker.job import artifacts, outcomes
from worker.job.progress import EventRecorder
from worker.maintenance import janitor

__all__ = ["bases", "folder", "stack", "started", "tokenizer"]
WORD = "zanzibarquince"
ROWS = [chat(f"Where is {n}?", f"In {WORD} {n}") for n in range(12)]
QUOTED = {**chat("Who?", "Nobody"), f"{WORD}_key": 1}  # the check of the file says which key it does not know
GRADIENT = {"method": "lora_ga", "samples": 4}


@pytest.fixture
def client(service: None) -> Iterator[TestClient]:
    with session_scope() as session:
        _, secret = keys.create_key(session, keys.get_or_create_project(session, "lab"), name="test")
        session.commit()
    with TestClient(create_app(), headers={"authorization": f"Bearer {secret}"}) as client:
        yield client


def upload(client: TestClient, rows: list[Any]) -> str:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    made = client.post("/v1/files", files={"file": ("rows.jsonl", content)}, data={"purpose": "fine-tune"})
    return str(made.raise_for_status().json()["id"])


def order(client: TestClient, training_file: str) -> str:
    settings = {"n_epochs": 1, "batch_size": 4, "learning_rate": 1e-3, "max_length": 128}
    body = {
        "model": MODEL,
        "training_file": training_file,
        "on_row_error": "skip",
        "method": {"type": "supervised", "supervised": {"hyperparameters": settings}},
        "lora": {"r": 2, "init": GRADIENT, "target_modules": ["q_proj"]},
    }
    return str(client.post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()["id"])


def train_and_die(base: Path) -> Job:
    """Everything that a worker does for the next job, but for cleaning up behind itself."""
    stub_worker.tidy()
    taken = stub_worker.claim()
    assert taken is not None
    job, lease = taken
    folder = get_settings().scratch() / job.id / "attempt-1"
    with scratch.lock_folder(folder):
        path = artifacts.prepare(job, lease, folder, get_storage())
        spec = RunSpec.model_validate_json(path.read_bytes())
        tiny = BaseModelRef(id=MODEL, source=str(base), root="tests/tiny", max_length=128)
        recorder = EventRecorder(lease)
        run(
            spec.model_copy(update={"model": tiny}),
            folder / "out",
            lambda event: _record(event, job, lease, folder, recorder),
        )
    return job


def _record(event: Event, job: Job, lease: Lease, folder: Path, recorder: EventRecorder) -> None:
    if isinstance(event, Done):
        recorder.flush()
        artifacts.store_result(job, lease, event, folder, get_storage(), recorder.progress)
        return
    recorder.add(event)
    if isinstance(event, Checkpoint):
        recorder.flush()
        artifacts.store_checkpoint(job, lease, event, folder, get_storage())


def a_minute_passes() -> None:
    """The chores of the reconciler, and the sweeps of a worker, that are due within it."""
    for path in get_settings().scratch().glob("ftjob-*/attempt-*"):
        os.utime(path, (path.stat().st_mtime - scratch.YOUNG_SECONDS - 1,) * 2)
    while janitor.clear():
        pass
    database.cut_write_ahead_log()
    caches.sweep()
    scratch.sweep()


def where_it_is(word: str, state: Path) -> set[str]:
    """The places that hold the word, as bytes or in rows of the database."""
    url = make_url(get_settings().database())
    files = [path for path in state.rglob("*") if path.is_file()]
    files += list(Path(url.database or "").parent.glob("*.db*")) if url.get_backend_name() == "sqlite" else []
    found = {path.name for path in files if word.encode() in path.read_bytes()}
    with session_scope(read_only=True) as session:
        for table in database.Base.metadata.sorted_tables:
            if any(word in json.dumps(list(row), default=str) for row in session.execute(select(table))):
                found.add(table.name)
    return found


def entries(kind: str) -> list[Path]:
    folder = get_settings().models() / kind
    return sorted(folder.iterdir()) if folder.is_dir() else []


def test_a_word_of_deleted_rows_is_nowhere_any_more(
    client: TestClient, bases: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = upload(client, [*ROWS, QUOTED])
    order(client, file)
    job_id = train_and_die(bases["llama"]).id
    job = client.get(f"/v1/fine_tuning/jobs/{job_id}").raise_for_status().json()
    assert job["status"] == "succeeded"
    assert {"files", "events", "training.jsonl", file} <= where_it_is(WORD, tmp_path)
    (tokenized,) = entries("tokens")
    assert WORD in make_tokenizer().decode(load_file(tokenized)["0"])
    assert entries("init")

    client.delete(f"/v1/files/{file}").raise_for_status()
    a_minute_passes()

    assert where_it_is(WORD, tmp_path) == set()  # the adapter, its checkpoints and results quote nothing
    assert entries("tokens") == entries("init") == []
    assert WORD not in "".join(capfd.readouterr())
    (events,) = [client.get(f"/v1/fine_tuning/jobs/{job_id}/events?limit=100").raise_for_status().json()]
    assert [event for event in events["data"] if event["data"].get("errors") == []]

    for path in (f"models/{job['fine_tuned_model']}", f"files/{job['result_files'][0]}"):
        client.delete(f"/v1/{path}").raise_for_status()
    a_minute_passes()
    assert [path for path in (tmp_path / "storage").rglob("*") if path.is_file()] == []


def test_a_run_that_failed_quotes_rows_in_its_job_alone_and_only_while_they_are_there(
    client: TestClient, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = upload(client, ROWS)
    job_id = order(client, file)
    stub_worker.tidy()
    taken = stub_worker.claim()
    assert taken is not None
    job, lease = taken
    message = f"12 of 12 rows of the training file cannot be used; first: Line 1: {WORD}."
    outcomes.end_as_reported(job, lease, Failed(code="invalid_training_file", message=message, param="data.training"))
    assert {"jobs", "events"} <= where_it_is(WORD, tmp_path)

    client.delete(f"/v1/files/{file}").raise_for_status()
    a_minute_passes()

    assert where_it_is(WORD, tmp_path) == set()
    assert WORD not in "".join(capfd.readouterr())
    error = client.get(f"/v1/fine_tuning/jobs/{job_id}").json()["error"]
    assert error == {"code": "invalid_training_file", "message": redaction.REMOVED, "param": "training_file"}


@pytest.mark.slow
def test_a_running_service_forgets_within_a_minute(stack: Stack, folder: Path) -> None:
    """Web process, reconciler and worker by themselves, their logs included."""
    word = "It is 11 and 11"
    order = stack.create({"r": 2, "init": GRADIENT})
    stack.wait(order.id, "succeeded")
    assert where_it_is(word, folder)
    assert entries("tokens") and entries("init")
    for file in (order.training_file, order.validation_file):
        stack.client.files.delete(str(file))
    began = time.monotonic()
    while where_it_is(word, folder) or entries("tokens") or entries("init"):
        left = (where_it_is(word, folder), entries("tokens"), entries("init"))
        assert time.monotonic() < began + within(120), left
        time.sleep(1)
