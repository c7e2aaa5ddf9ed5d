"""Section 13.10: comparing initializations, with the client's plain `post` and `get`."""

import csv
import io
import statistics
import time
from typing import Any

from harness import CLIENT, JOBS, MODEL, ROW, Seen, check, refusal, training_file, upload, within

GRID = {"init": ["kaiming", {"method": "pissa", "niter": 16}], "learning_rates": [1e-4, 2e-4], "seeds": [1, 2]}


def request(**fields: Any) -> dict[str, Any]:
    validation = upload((ROW * 3).encode(), name="valid.jsonl").id
    job = {"model": MODEL, "training_file": training_file(), "validation_file": validation, **fields.pop("job", {})}
    return {"name": "inits", "job": job, "grid": GRID, **fields}


def create(body: dict[str, Any]) -> Any:
    return CLIENT.post("/experiments", body=body, cast_to=object)


def read(experiment_id: str) -> Any:
    return CLIENT.get(f"/experiments/{experiment_id}", cast_to=object)


def finished(experiment_id: str) -> Any:
    deadline = time.time() + within(60)
    while time.time() < deadline:
        found = read(experiment_id)
        if found["status"] not in ("queued", "running"):
            return found
        time.sleep(0.2)
    raise AssertionError(f"the experiment is still {found['status']}")


def jobs_of(experiment_id: str) -> list[Any]:
    return list(JOBS.list(metadata={"experiment_id": experiment_id}, limit=100))


def best_loss(job: Any) -> float:
    """The best validation loss of a job, from its result file."""
    text = CLIENT.files.content(job.result_files[0]).text
    rows = [row for row in csv.DictReader(io.StringIO(text)) if row["valid_loss"] and row["step"] != "0"]
    return min(float(row["valid_loss"]) for row in rows)


@check("79")
def two_by_two_by_two() -> Seen:
    made = create(request())
    assert made["status"] == "queued" and made["results"] == [] and made["card"] is None
    found = finished(made["id"])
    jobs = {job.id: job for job in jobs_of(made["id"])}
    assert len(jobs) == 8
    assert {job.experiment_id for job in jobs.values()} == {made["id"]}
    for row in found["results"]:
        cells = [jobs[job_id] for job_id in row["job_ids"]]
        assert [job.seed for job in cells] == GRID["seeds"]
        losses = [best_loss(job) for job in cells]
        assert abs(row["objective"]["mean"] - statistics.fmean(losses)) < 1e-6
        assert abs(row["objective"]["std"] - statistics.stdev(losses)) < 1e-6
    assert found["card"]["same"]["row_order"] == "per seed"
    names = [row["init"]["method"] for row in found["results"]]
    rates = [row["learning_rate"] for row in found["results"]]
    cells = sorted(job.metadata["cell"] for job in jobs.values())
    return {"status": found["status"], "names": names, "rates": rates, "cells": cells}


@check("80")
def one_cell_fails_and_one_experiment_is_cancelled() -> Seen:
    failing = create(request(job={"metadata": {"stub": "fail pissa/0.0001/1"}}))
    failed = finished(failing["id"])
    held = create(request(job={"metadata": {"stub": "hold"}}))
    deadline = time.time() + within(30)
    while read(held["id"])["status"] != "running" and time.time() < deadline:
        time.sleep(0.1)
    cancelled: Any = CLIENT.post(f"/experiments/{held['id']}/cancel", cast_to=object)
    assert {job.status for job in jobs_of(held["id"])} == {"cancelled"}
    wrong = request(grid={**GRID, "seeds": [1, 1]})
    counts = failed["job_counts"]
    return {
        "failed": [failed["status"], counts["failed"], sum(row["failed_runs"] for row in failed["results"])],
        "cancelled": [cancelled["status"], cancelled["job_counts"]["cancelled"]],
        "refused": refusal(lambda: create(wrong)),
    }
