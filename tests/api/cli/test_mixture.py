"""A mixture of experts, ordered from `lorainit serve` by a stock `openai` client and read by stock PEFT."""

import io
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from tests.api.cli.conftest import Served
from tests.lorainit.conftest import chat, write_rows
from tests.test_job_path import loss_with_stock_peft

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture
def client(served: Served) -> OpenAI:
    return OpenAI(base_url=served.url, api_key=served.key)


def order(client: OpenAI, rows: Path, validation: Path, **lora: Any) -> FineTuningJob:
    training = {"n_epochs": 4, "batch_size": 8, "learning_rate": 1e-2}
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": training}}
    files = [client.files.create(file=path, purpose="fine-tune").id for path in (rows, validation)]
    return client.fine_tuning.jobs.create(
        model="tiny-moe",
        training_file=files[0],
        validation_file=files[1],
        seed=3,
        method=method,
        extra_body={"lora": {"r": 4, **lora}},
    )


@pytest.fixture
def validation(tmp_path: Path) -> Path:
    """The rows of `loss_with_stock_peft`."""
    return write_rows(tmp_path / "validation.jsonl", [chat(f"What is {n}?", f"It is {n} and {n}") for n in range(4)])


def test_a_job_on_a_mixture_of_a_hub_trains_its_experts_says_so_and_is_read_by_stock_peft(
    client: OpenAI, rows: Path, validation: Path, catalogue: Path, tmp_path: Path
) -> None:
    job: Any = order(client, rows, validation, init="pissa")
    deadline = time.monotonic() + 120
    while job.status not in ("succeeded", "failed"):
        assert time.monotonic() < deadline, job.status
        time.sleep(0.1)
        job = client.fine_tuning.jobs.retrieve(job.id)
    assert (job.status, job.error) == ("succeeded", None)

    # Two layers with four matrices of attention and two of each of four experts: of rank 4, between these widths.
    trained = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 4 * (64 + 256) + 4 * (128 + 64))
    assert set(EXPERTS) < set(job.lora["target_modules"])
    assert (job.lora["left_out"], job.lora["modules"], job.lora["trainable_parameters"]) == ([], 24, trained)
    (cost,) = [text for text in messages(client, job) if text.startswith("A mixture of experts")]
    assert "24 adapters, 16 of them on matrices of experts, cover 99 %" in cost
    assert f"{trained:,} numbers are trained, which take 0.4 MiB" in cost

    log = client.files.content(job.result_files[0]).text.splitlines()
    reported = [float(row.split(",")[log[0].split(",").index("full_valid_loss")]) for row in (log[1], log[-1])]
    assert reported[0] - reported[1] > 0.1
    with tarfile.open(fileobj=io.BytesIO(client.files.content(job.adapter["file_id"]).read())) as archive:
        archive.extractall(tmp_path / "adapter", filter="data")
    assert "base_model: Lab/Mixture\n" in (tmp_path / "adapter" / "README.md").read_text()
    assert '"base_model_name_or_path": "Lab/Mixture"' in (tmp_path / "adapter" / "adapter_config.json").read_text()
    loss = loss_with_stock_peft(catalogue.parent / "mixture", tmp_path / "adapter")
    assert loss == pytest.approx(reported[1], abs=1e-4)


def messages(client: OpenAI, job: FineTuningJob) -> list[str]:
    return [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]


def test_experts_that_cannot_carry_the_adapter_are_listed_with_the_reason_when_the_job_is_made(
    client: OpenAI, rows: Path, validation: Path
) -> None:
    job: Any = order(client, rows, validation, use_dora=True)
    client.fine_tuning.jobs.cancel(job.id)
    assert {one["name"]: one["reason"] for one in job.lora["left_out"]} == dict.fromkeys(
        EXPERTS, "PEFT has no DoRA for experts"
    )
    assert not set(EXPERTS) & set(job.lora["target_modules"])
