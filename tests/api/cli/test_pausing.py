"""A real run under a real service, paused in the middle and resumed: the same adapter as if nothing had happened."""

import csv
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from tests.api.cli.conftest import Served

STEPS = 300


@pytest.fixture
def client(served: Served) -> OpenAI:
    return OpenAI(base_url=served.url, api_key=served.key)


@pytest.fixture
def order(client: OpenAI, rows: Path) -> Callable[[], FineTuningJob]:
    """The same order each time, under a name that makes it no retry."""
    file = client.files.create(file=rows, purpose="fine-tune").id
    training = {"max_steps": STEPS, "batch_size": 2, "checkpoint_interval": 100_000, "learning_rate": 1e-3}
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": training}}
    extra = {"lora": {"r": 4, "init": "kaiming"}}
    names = iter(("straight", "paused"))
    return lambda: client.fine_tuning.jobs.create(
        model="tiny", training_file=file, seed=3, method=method, suffix=next(names), extra_body=extra
    )


def until(client: OpenAI, job: FineTuningJob, holds: Callable[[Any], bool]) -> Any:
    deadline = time.monotonic() + 120
    while not holds(found := client.fine_tuning.jobs.retrieve(job.id)):
        assert time.monotonic() < deadline, f"still {found.status}: {found.error}"
        time.sleep(0.05)
    return found


def log_of(client: OpenAI, job: FineTuningJob) -> list[tuple[str, str, str]]:
    text = client.files.content(job.result_files[0]).text
    return [(row["step"], row["train_loss"], row["train_accuracy"]) for row in csv.DictReader(text.splitlines())]


@pytest.mark.slow  # what the worker does: tests/worker/test_pausing.py; the bits: tests/lorainit/test_stop.py
def test_a_job_paused_in_the_middle_ends_as_if_it_had_not_been(
    client: OpenAI, order: Callable[[], FineTuningJob], served: Served
) -> None:
    straight, job = order(), order()
    until(client, job, lambda one: one.status == "running" and one.progress and one.progress["step"] > 5)
    assert client.fine_tuning.jobs.pause(job.id).status == "pausing"
    paused = until(client, job, lambda one: one.status == "paused")
    assert 5 < paused.resume["from_step"] < STEPS
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    ended = until(client, job, lambda one: one.status in ("succeeded", "failed"))
    assert (ended.status, ended.error) == ("succeeded", None)
    assert ended.progress["step"] == STEPS

    before = until(client, straight, lambda one: one.status in ("succeeded", "failed"))
    folders = [served.state.parent / name for name in ("straight", "paused")]
    for one, folder in zip((straight, job), folders, strict=True):
        assert served.run("download", one.id, str(folder)).returncode == 0
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]
    assert log_of(client, ended) == log_of(client, before)
    assert len(log_of(client, ended)) == STEPS


def test_a_waiting_job_is_paused_and_resumed_from_a_terminal(served: Served, rows: Path) -> None:
    """Its device is one that no worker has, so that it waits."""
    job = served.run("submit", str(rows), "--model", "tiny", "--r", "4", "--device", "elsewhere").stdout.strip()
    assert served.run("pause", job).stdout.strip() == f"{job} paused"
    assert served.run("resume", job).stdout.split() in ([job, "queued"], [job, "validating_files"])
    shown = OpenAI(base_url=served.url, api_key=served.key).fine_tuning.jobs.retrieve(job)
    assert served.run("cancel", job).stdout.strip() == f"{job} cancelled"
    refused = served.run("resume", job)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "has already been cancelled" in refused.stderr
    assert shown.resources["device"] == "elsewhere"  # type: ignore[attr-defined]
