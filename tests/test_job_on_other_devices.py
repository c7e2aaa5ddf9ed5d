"""A job that goes on with another number of processes than it began with, through the whole service.

The service gives a job no other number by itself. An operator whose machine has lost a device changes it in the row.
"""

import csv
import io
import tarfile

import psutil
import pytest
import torch
from safetensors.torch import load as load_tensors
from sqlalchemy import update

from api.core.db.database import session_scope
from api.core.db.tables import Job
from tests.stack import Stack, children_of, wait_for
from tests.test_job_path import folder, stack, started

__all__ = ["folder", "stack", "started"]  # fixtures

FIGURES = ("train_loss", "train_mean_token_accuracy", "valid_loss", "full_valid_loss")


def curve(stack: Stack, job_id: str) -> dict[int, dict[str, float]]:
    """The figures of each step."""
    (file,) = stack.client.fine_tuning.jobs.retrieve(job_id).result_files
    rows = csv.DictReader(io.StringIO(stack.client.files.content(file).text))
    return {int(row["step"]): {name: float(row[name]) for name in FIGURES if row[name]} for row in rows}


def adapter(stack: Stack, job_id: str) -> dict[str, torch.Tensor]:
    file = stack.client.fine_tuning.jobs.retrieve(job_id).adapter["file_id"]  # type: ignore[attr-defined]
    with tarfile.open(fileobj=io.BytesIO(stack.client.files.content(file).read())) as archive:
        weights = archive.extractfile("adapter_model.safetensors")
        assert weights is not None
        return load_tensors(weights.read())


def leading(stack: Stack) -> psutil.Process:
    return wait_for(  # type: ignore[no-any-return]
        lambda: next((run for run in children_of(stack.processes["worker"]) if "--events-fd" in run.cmdline()), None)
    )


@pytest.mark.slow
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(("before", "after"), [(3, 1), (2, 1), (1, 2)])
def test_a_job_goes_on_with_other_processes_as_if_nothing_had_happened(stack: Stack, before: int, after: int) -> None:
    """Twenty rows a step are three passes here, so that each of three processes has one; with dropout."""
    recipe = {"n_epochs": 25, "batch_size": 20, "checkpoint_interval": 4}
    whole, broken = (
        stack.create({"init": "kaiming", "r": 4, "dropout": 0.1}, rows=40, devices=devices, **recipe).id
        for devices in (1, before)
    )
    wait_for(lambda: list(stack.client.fine_tuning.jobs.checkpoints.list(broken)))
    first = leading(stack)
    first.suspend()  # so that it does not end before the row is changed
    assert len(first.children()) == before - 1
    with session_scope() as session:
        session.execute(update(Job).where(Job.id == broken).values(devices=after))
        session.commit()
    first.kill()
    stack.wait(broken, "succeeded")

    story = stack.messages(broken)
    assert story.count("Fine-tuning job started") == 2, story
    assert sum(text.startswith("Step 1/") for text in story) == 1, "it went on from its checkpoint"
    ended = stack.client.fine_tuning.jobs.retrieve(broken)
    assert ended.resources["devices"] == after  # type: ignore[attr-defined]
    expected, found = curve(stack, whole), curve(stack, broken)
    assert list(found) == list(expected) == list(range(51))
    for step, figures in expected.items():
        assert figures
        assert found[step] == pytest.approx(figures, abs=1e-5), step
    ours, theirs = adapter(stack, broken), adapter(stack, whole)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], rtol=1e-4, atol=2e-6), name
