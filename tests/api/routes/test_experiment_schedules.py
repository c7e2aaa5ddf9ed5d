"""Which jobs of an experiment run when: limits, halving, extension and confirmation."""

import math

import pytest

from api.core.db.database import session_scope
from api.core.db.tables import Job
from tests import stub_worker
from tests.api.conftest import JOBS, Lab
from tests.api.routes.compared import create, losses, read, run_to_its_end
from worker import reconciler

pytestmark = pytest.mark.one_database


def test_no_more_jobs_run_at_once_than_the_experiment_may(lab: Lab) -> None:
    made = create(lab, max_parallel=3)
    stub_worker.tidy()
    claimed = 0
    ended = 0
    while ended < 8:
        running = []
        while (taken := stub_worker.claim()) is not None:
            running.append(taken)
        assert 0 < len(running) <= 3
        claimed += len(running)
        for one in running:
            stub_worker.train(*one, valid=losses)
            ended += 1
        while reconciler.advance_experiments():
            pass
        stub_worker.tidy()
    assert claimed == 8
    assert read(lab, made["id"])["status"] == "succeeded"


def test_halving_stops_what_is_far_behind_and_lets_the_best_go_to_their_end(lab: Lab) -> None:
    grid = {"init": ["kaiming", "pissa", "olora"], "learning_rates": [1e-4, 2e-4], "seeds": [1, 2]}
    made = create(lab, grid=grid, schedule="halving")
    quality = {"kaiming": 0.0, "pissa": 0.1, "olora": 0.2}

    def loss(job: Job, step: int) -> float:
        rate = job.recipe["training"]["learning_rate"]
        return 3.0 - 0.01 * step + quality[job.recipe["lora"]["init"]["method"]] + (0.02 if rate > 1e-4 else 0.0)

    trained = 0
    for _ in range(8):
        stub_worker.tidy()
        while (taken := stub_worker.claim()) is not None:
            trained += 1
            if taken[0].stop_after is None:
                stub_worker.train(*taken, steps=100, valid=loss)
            else:
                stub_worker.halt(*taken, steps=100, valid=loss)
        while reconciler.advance_experiments():
            pass
    shown = read(lab, made["id"])
    assert shown["status"] == "succeeded"
    assert [(decision["rung"], decision["step"]) for decision in shown["decisions"]] == [
        (0.1, 10),
        (0.3, 30),
        (0.6, 60),
    ]
    kept = [[(cell["treatment"][0], cell["learning_rate"]) for cell in decision["cells"] if cell["kept"]]
            for decision in shown["decisions"]]  # fmt: skip
    assert kept == [[(0, 1e-4), (0, 2e-4)]] * 3
    assert trained == 12 + 3 * 4
    best, *others = shown["results"]
    assert (best["name"], best["learning_rate"], best["stopped_at_step"], best["failed_runs"]) == (
        "kaiming",
        1e-4,
        None,
        0,
    )
    assert {(row["name"], row["stopped_at_step"], row["failed_runs"]) for row in others} == {
        ("pissa", 10, 0),
        ("olora", 10, 0),
    }
    assert shown["job_counts"]["succeeded"] == 4 and shown["job_counts"]["cancelled"] == 8


def test_a_halted_job_that_somebody_resumes_goes_to_its_end(lab: Lab) -> None:
    grid = {"init": ["kaiming", "pissa", "olora"], "learning_rates": [1e-4], "seeds": [1]}
    create(lab, grid=grid, schedule="halving")
    stub_worker.tidy()
    taken = stub_worker.claim()
    assert taken is not None
    stub_worker.halt(*taken, steps=100, valid=losses_of_all)
    job = lab.client.get(f"{JOBS}/{taken[0].id}").json()
    assert job["status"] == "paused"
    assert lab.client.post(f"{JOBS}/{job['id']}/resume").json()["status"] == "queued"
    with session_scope() as session:
        assert session.get_one(Job, job["id"]).stop_after is None


def losses_of_all(job: Job, step: int) -> float:
    return 3.0 - 0.01 * step


def best_at_one_hundredth(job: Job, step: int) -> float:
    """A loss whose best rate is 0.01 for pissa and 0.0001 for kaiming."""
    rate, method = job.recipe["training"]["learning_rate"], job.recipe["lora"]["init"]["method"]
    return 3.0 - 0.1 * step + 0.1 * abs(math.log10(rate) + (2.0 if method == "pissa" else 4.0)) + 0.001 * (job.seed % 3)


def test_a_grid_is_extended_where_a_best_rate_lies_at_its_edge(lab: Lab) -> None:
    grid = {"init": ["kaiming", "pissa"], "learning_rates": [1e-5, 1e-4, 1e-3], "seeds": [1, 2]}
    made = create(lab, grid=grid, extend=True)
    shown = run_to_its_end(lab, made["id"], best_at_one_hundredth)
    pissa, kaiming = (next(row for row in shown["results"] if row["name"] == name) for name in ("pissa", "kaiming"))
    assert [one["learning_rate"] for one in pissa["by_learning_rate"]] == [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
    assert (pissa["learning_rate"], pissa["learning_rate_at_edge"]) == (1e-2, False)
    assert len(kaiming["by_learning_rate"]) == 3
    assert shown["job_counts"]["total"] == 12 + 4
    assert "3 to 5 rates" in shown["card"]["selection"]
    job = lab.client.get(f"{JOBS}/{pissa['job_ids'][0]}").json()
    assert job["metadata"]["cell"] == "pissa/0.01/1"
    assert job["method"]["supervised"]["hyperparameters"]["learning_rate"] == 1e-2


def test_an_extension_stays_within_its_budget(lab: Lab) -> None:
    grid = {"init": ["pissa"], "learning_rates": [1e-5, 1e-4], "seeds": [1, 2]}
    shown = run_to_its_end(lab, create(lab, grid=grid, extend=True, max_jobs=7)["id"], best_at_one_hundredth)
    assert shown["job_counts"]["total"] == 6
    assert shown["results"][0]["learning_rate_at_edge"] is True


def test_the_leaders_and_the_baseline_are_run_again_on_fresh_seeds(lab: Lab) -> None:
    grid = {"init": ["kaiming", "pissa", "olora"], "learning_rates": [1e-4], "seeds": [1, 2, 3]}

    def loss(job: Job, step: int) -> float:
        worse = {"kaiming": 0.5, "pissa": 0.0, "olora": 1.0}[job.recipe["lora"]["init"]["method"]]
        return 3.0 - 0.1 * step + worse + 0.001 * ((job.seed * 7 + len(job.recipe["lora"]["init"]["method"])) % 5)

    shown = run_to_its_end(lab, create(lab, grid=grid, confirm_seeds=4)["id"], loss)
    assert [row["objective"]["n"] for row in shown["results"]] == [3, 3, 3]
    fresh = shown["confirmation"]["results"]
    assert [(row["name"], row["objective"]["n"]) for row in fresh] == [("pissa", 4), ("kaiming", 4)]
    seeds = {lab.client.get(f"{JOBS}/{job}").json()["seed"] for row in fresh for job in row["job_ids"]}
    assert seeds == {4, 5, 6, 7}
    assert "pissa is better than kaiming" in shown["confirmation"]["summary"][0]
    assert shown["job_counts"]["total"] == 9 + 8
