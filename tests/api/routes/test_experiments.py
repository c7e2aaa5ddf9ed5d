"""Experiments over HTTP: a set of jobs, the table when they end, cancelling, deleting and the report."""

from typing import Any

import pytest
from scipy.stats import t as student
from sqlalchemy.orm import Session

from api.core.db.tables import Job
from tests import stub_worker
from tests.api.conftest import JOBS, Lab, refused
from tests.api.routes.compared import EXPERIMENTS, GRID, a_request, create, losses, read


def test_an_experiment_is_a_set_of_ordinary_jobs(lab: Lab) -> None:
    made = create(lab, metadata={"team": "a"}, job={"metadata": {"purpose": "test"}})
    assert (made["status"], made["results"], made["card"], made["summary"]) == ("queued", [], None, [])
    assert made["job_counts"] == {"total": 8, "queued": 8, "running": 0, "succeeded": 0, "failed": 0, "cancelled": 0}
    assert made["grid"]["init"] == [{"method": "kaiming"}, {"method": "pissa", "niter": 16}]
    found = lab.client.get(JOBS, params={"metadata[experiment_id]": made["id"], "limit": 100}).json()["data"]
    assert len(found) == 8
    assert {job["experiment_id"] for job in found} == {made["id"]}
    assert {job["metadata"]["cell"] for job in found} == {
        f"{method}/{rate:g}/{seed}" for method in ("kaiming", "pissa") for rate in (1e-4, 2e-4) for seed in (1, 2)
    }
    for job in found:
        method, rate, seed = job["metadata"]["cell"].split("/")
        assert job["metadata"]["purpose"] == "test"
        assert (job["lora"]["init"]["method"], job["seed"]) == (method, int(seed))
        assert job["hyperparameters"]["learning_rate"] == float(rate)
        assert job["lora"]["r"] == 8
        assert job["resources"]["group"] is True


def test_the_table_is_what_the_jobs_metrics_say(lab: Lab) -> None:
    made = create(lab, grid={**GRID, "seeds": [1, 2, 3]})
    assert stub_worker.run_all(losses) == 12
    shown = read(lab, made["id"])
    assert shown["status"] == "succeeded"
    assert shown["finished_at"] is not None
    jobs = {
        job["id"]: job
        for job in lab.client.get(JOBS, params={"metadata[experiment_id]": made["id"], "limit": 100}).json()["data"]
    }
    first, second = shown["results"]
    assert (first["name"], first["learning_rate"], second["name"], second["learning_rate"]) == (
        "pissa", 1e-4, "kaiming", 2e-4,
    )  # fmt: skip
    for row in shown["results"]:
        values = []
        for job_id in row["job_ids"]:
            csv = lab.client.get(f"/v1/files/{jobs[job_id]['result_files'][0]}/content").text.splitlines()
            column = csv[0].split(",").index("valid_loss")
            values.append(min(float(line.split(",")[column]) for line in csv[2:]))
        assert row["objective"]["mean"] == pytest.approx(sum(values) / 3, abs=1e-6)
        assert row["objective"]["n"] == 3
    best, other = first["job_ids"], second["job_ids"]
    assert [jobs[one]["seed"] for one in best] == [jobs[one]["seed"] for one in other] == [1, 2, 3]


@pytest.mark.one_database
def test_differences_are_paired_by_seed(lab: Lab) -> None:
    made = create(lab, grid={**GRID, "learning_rates": [1e-4], "seeds": [1, 2, 3]})
    by = {("kaiming", 1): 5.0, ("kaiming", 2): 6.1, ("kaiming", 3): 7.0}
    by |= {("pissa", 1): 4.0, ("pissa", 2): 5.0, ("pissa", 3): 6.1}
    stub_worker.run_all(lambda job, step: by[job.recipe["lora"]["init"]["method"], job.seed])
    first, second = read(lab, made["id"])["results"]
    assert first["difference_to_best"] is None
    difference = second["difference_to_best"]
    assert difference["mean"] == pytest.approx((1.0 + 1.1 + 0.9) / 3)
    half = float(student.ppf(0.975, 2)) * 0.1 / 3**0.5
    assert difference["ci95"] == pytest.approx([1.0 - half, 1.0 + half], abs=1e-6)
    # The spread between seeds, of about 1, drops out: the two are distinguishable.
    assert not second["tied_with_best"]


@pytest.mark.one_database
def test_a_failed_cell_counts_and_the_ranking_is_still_there(lab: Lab) -> None:
    made = create(lab)
    jobs = lab.client.get(JOBS, params={"metadata[cell]": "pissa/0.0001/1"}).json()["data"]
    stub_worker.tidy()
    while (taken := stub_worker.claim()) is not None:
        if taken[0].id == jobs[0]["id"]:
            stub_worker.fail(taken[1])
        else:
            stub_worker.train(*taken, valid=losses)
    shown = read(lab, made["id"])
    assert (shown["status"], shown["job_counts"]["failed"]) == ("succeeded", 1)
    pissa = next(row for row in shown["results"] if row["name"] == "pissa")
    assert (pissa["failed_runs"], pissa["learning_rate"]) == (1, 2e-4)  # the rate at which both seeds finished
    assert any("1 runs failed" in warning for warning in shown["card"]["warnings"])


def test_cancelling_ends_every_job_that_has_not_ended(lab: Lab) -> None:
    made = create(lab)
    stub_worker.tidy()
    taken = stub_worker.claim()
    assert taken is not None
    stub_worker.train(*taken, valid=losses)
    cancelled = lab.client.post(f"{EXPERIMENTS}/{made['id']}/cancel").json()
    assert cancelled["status"] == "cancelled"
    assert cancelled["job_counts"] == {
        "total": 8, "queued": 0, "running": 0, "succeeded": 1, "failed": 0, "cancelled": 7,
    }  # fmt: skip
    again = lab.client.post(f"{EXPERIMENTS}/{made['id']}/cancel")
    assert again.json()["finished_at"] == cancelled["finished_at"]
    assert read(lab, made["id"])["status"] == "cancelled"
    assert stub_worker.run_all() == 0


@pytest.mark.one_database
def test_an_ended_experiment_is_not_cancelled(lab: Lab) -> None:
    made = create(lab)
    stub_worker.run_all(losses)
    read(lab, made["id"])
    refused(lab.client.post(f"{EXPERIMENTS}/{made['id']}/cancel"), 400, "invalid_job_state")


def test_deleting_keeps_the_jobs(lab: Lab) -> None:
    made = create(lab)
    refused(lab.client.delete(f"{EXPERIMENTS}/{made['id']}"), 400, "invalid_job_state")
    stub_worker.run_all(losses)
    shown = read(lab, made["id"])
    reply = lab.client.delete(f"{EXPERIMENTS}/{made['id']}")
    assert reply.json() == {"id": made["id"], "object": "experiment", "deleted": True}
    refused(lab.client.get(f"{EXPERIMENTS}/{made['id']}"), 404, "experiment_not_found", "experiment_id")
    job = lab.client.get(f"{JOBS}/{shown['results'][0]['job_ids'][0]}").json()
    assert (job["status"], job["experiment_id"]) == ("succeeded", None)


def test_experiments_of_the_project_are_listed_without_results(lab: Lab, stranger: Lab) -> None:
    first, second = create(lab), create(lab, name="another")
    stub_worker.run_all(losses)
    shown = lab.client.get(EXPERIMENTS, params={"limit": 1}).json()
    assert ([row["id"] for row in shown["data"]], shown["has_more"]) == ([second["id"]], True)
    rest = lab.client.get(EXPERIMENTS, params={"after": second["id"]}).json()
    assert [row["id"] for row in rest["data"]] == [first["id"]]
    assert rest["data"][0]["results"] == []
    assert stranger.client.get(EXPERIMENTS).json()["data"] == []
    for verb in ("get", "delete"):
        refused(
            getattr(stranger.client, verb)(f"{EXPERIMENTS}/{first['id']}"), 404, "experiment_not_found", "experiment_id"
        )


def test_a_job_resumed_after_its_end_counts_when_it_ends_again(lab: Lab) -> None:
    made = create(lab, grid={**GRID, "init": ["kaiming"], "learning_rates": [1e-4]})
    stub_worker.tidy()
    failed = stub_worker.claim()
    assert failed is not None
    with_checkpoint(failed)
    stub_worker.run_all(losses)
    assert read(lab, made["id"])["results"][0]["failed_runs"] == 1
    assert lab.client.post(f"{JOBS}/{failed[0].id}/resume").status_code == 200
    assert read(lab, made["id"])["status"] == "running"
    stub_worker.run_all(losses)
    shown = read(lab, made["id"])
    assert (shown["status"], shown["results"][0]["failed_runs"]) == ("succeeded", 0)


def with_checkpoint(taken: Any) -> None:
    """A run that writes a checkpoint and then fails for no fault of its own."""
    import tempfile
    from pathlib import Path

    from api.core.files.storage import get_storage
    from lorainit.config.events import Checkpoint
    from worker.job import artifacts

    job, lease = taken
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stub_worker._adapter(folder / "step")
        event = Checkpoint(step=1, path=str(folder / "step"), metrics={"step": 1, "train_loss": 1.0})
        artifacts.store_checkpoint(job, lease, event, folder, get_storage())
    stub_worker.fail(lease, "out_of_memory")


@pytest.mark.one_database
def test_the_same_request_again_makes_no_second_experiment(lab: Lab) -> None:
    request, headers = a_request(lab), {"Idempotency-Key": "once"}
    first = lab.client.post(EXPERIMENTS, json=request, headers=headers)
    again = lab.client.post(EXPERIMENTS, json=request, headers=headers)
    assert again.json()["id"] == first.json()["id"]
    assert again.headers["idempotency-replayed"] == "true"
    assert len(lab.client.get(JOBS, params={"limit": 100}).json()["data"]) == 8


@pytest.mark.one_database
def test_rates_may_be_left_to_the_server(lab: Lab) -> None:
    made = create(lab, grid={**GRID, "learning_rates": "auto"})
    jobs = lab.client.get(JOBS, params={"metadata[experiment_id]": made["id"], "limit": 100}).json()["data"]
    rates = {
        method: sorted(
            {job["hyperparameters"]["learning_rate"] for job in jobs if job["lora"]["init"]["method"] == method}
        )
        for method in ("kaiming", "pissa")
    }
    assert rates == {"kaiming": [3.3e-4, 1e-3, 3e-3], "pissa": [6.7e-5, 2e-4, 6e-4]}


@pytest.mark.one_database
def test_ranks_are_an_axis_of_the_grid(lab: Lab) -> None:
    made = create(lab, grid={**GRID, "ranks": [4, 8], "learning_rates": [1e-4]})
    stub_worker.run_all(losses)
    shown = read(lab, made["id"])
    assert sorted((row["name"], row["r"]) for row in shown["results"]) == [
        ("kaiming r4", 4), ("kaiming r8", 8), ("pissa r4", 4), ("pissa r8", 8),
    ]  # fmt: skip


@pytest.mark.one_database
def test_the_card_says_what_was_the_same_and_what_was_not(lab: Lab) -> None:
    made = create(lab)
    stub_worker.run_all(losses)
    card = read(lab, made["id"])["card"]
    assert card["comparable"] is True
    assert card["same"]["steps"] == 3
    assert card["same"]["row_order"] == "per seed"
    assert card["same"]["trained_tokens"] == 30
    assert any("edge of a grid of 2" in warning for warning in card["warnings"])
    assert any("spread" in warning for warning in card["warnings"])


@pytest.mark.one_database
def test_cells_on_different_machines_are_not_comparable(lab: Lab, session: Session) -> None:
    made = create(lab)
    stub_worker.tidy()
    while (taken := stub_worker.claim()) is not None:
        stub_worker.train(*taken, valid=losses)
    job = session.query(Job).filter(Job.experiment_id == made["id"]).first()
    assert job is not None
    job.resources = {**(job.resources or {}), "gpu_name": "NVIDIA A100"}
    session.commit()
    card = read(lab, made["id"])["card"]
    assert card["comparable"] is False
    assert [one["field"] for one in card["differences"]] == ["gpu_name"]
    assert "gpu_name differs" in card["warnings"][0]


@pytest.mark.one_database
def test_the_report_is_one_page_that_needs_nothing_else(lab: Lab) -> None:
    made = create(lab, name="<b>bold</b>")
    before = lab.client.get(f"{EXPERIMENTS}/{made['id']}/report")
    assert before.status_code == 200 and "<svg" not in before.text
    stub_worker.run_all(losses)
    read(lab, made["id"])
    reply = lab.client.get(f"{EXPERIMENTS}/{made['id']}/report")
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert reply.text.count("<svg") == 2
    assert "&lt;b&gt;bold&lt;/b&gt;" in reply.text and "<b>bold" not in reply.text
    assert "<script" not in reply.text and 'src="http' not in reply.text
    assert "pissa is better than kaiming" in reply.text or "No difference beyond noise" in reply.text
    assert reply.text == lab.client.get(f"{EXPERIMENTS}/{made['id']}/report").text
