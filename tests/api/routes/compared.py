"""Experiments for tests: a request, runs of the stub worker with validation losses, and what is read of them."""

from typing import Any

from api.core.db.tables import Job
from tests import stub_worker
from tests.api.conftest import JSONL, Lab
from tests.things import MODEL
from worker import reconciler

EXPERIMENTS = "/v1/experiments"
GRID = {"init": ["kaiming", {"method": "pissa", "niter": 16}], "learning_rates": [1e-4, 2e-4], "seeds": [1, 2]}


def a_request(lab: Lab, **fields: Any) -> dict[str, Any]:
    """An experiment of 2 x 2 x 2 jobs."""
    job = {
        "model": MODEL,
        "training_file": lab.upload()["id"],
        "validation_file": lab.upload(JSONL * 2)["id"],
        "lora": {"r": 8},
        **fields.pop("job", {}),
    }
    return {"name": "inits on support data", "job": job, "grid": GRID, **fields}


def create(lab: Lab, **fields: Any) -> dict[str, Any]:
    reply = lab.client.post(EXPERIMENTS, json=a_request(lab, **fields))
    assert reply.status_code == 200, reply.text
    return reply.json()


def read(lab: Lab, experiment_id: str) -> dict[str, Any]:
    while reconciler.advance_experiments():
        pass
    reply = lab.client.get(f"{EXPERIMENTS}/{experiment_id}")
    assert reply.status_code == 200, reply.text
    return reply.json()


def losses(job: Job, step: int) -> float:
    """pissa is better by 0.1 and best at the lower rate; seeds differ by 1, and results by a little noise."""
    start = 3.0 + job.seed
    method, rate = job.recipe["lora"]["init"]["method"], job.recipe["training"]["learning_rate"]
    gain = {"pissa": 0.4, "kaiming": 0.3}[method] - (0.02 if (rate > 1e-4) == (method == "pissa") else 0.0)
    noise = 0.001 * ((job.seed * 7 + int(rate * 1e5) + len(method)) % 3)
    return start - gain * step + noise


def run_to_its_end(lab: Lab, experiment_id: str, valid: stub_worker.Validation) -> dict[str, Any]:
    for _ in range(10):
        stub_worker.run_all(valid)
        shown = read(lab, experiment_id)
        if shown["status"] in ("succeeded", "failed"):
            return shown
    raise AssertionError("it never ended")
