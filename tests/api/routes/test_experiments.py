"""Experiments over HTTP: what is admitted, what is refused, and what the table says when jobs end."""

import math
from typing import Any

import pytest
from scipy.stats import t as student
from sqlalchemy.orm import Session

from api.core.db.database import session_scope
from api.core.db.tables import Job
from lorainit.config.events import Metrics
from tests import stub_worker
from tests.api.conftest import JOBS, JSONL, Lab, mark, refused
from tests.things import MODEL
from worker import reconciler
from worker.job import outcomes
from worker.job.progress import EventRecorder

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


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"grid": {**GRID, "seeds": [1, 1]}}, "invalid_value", "grid.seeds"),
        ({"grid": {**GRID, "init": []}}, "invalid_value", "grid.init"),
        ({"grid": {**GRID, "init": ["kaiming", "kaiming"]}}, "invalid_value", "grid.init"),
        ({"grid": {**GRID, "init": ["nonsense"]}}, "unsupported_init_method", "grid.init[0].method"),
        ({"grid": {**GRID, "init": ["auto"]}}, "invalid_value", "grid.init[0]"),
        ({"grid": {**GRID, "learning_rates": [2.0]}}, "invalid_value", "grid.learning_rates[0]"),
        ({"grid": {**GRID, "seeds": list(range(32)), "learning_rates": [k * 1e-5 for k in range(1, 9)]}},
         "invalid_value", "grid"),
        ({"job": {"seed": 1}}, "invalid_value", "job.seed"),
        ({"job": {"suffix": "a"}}, "invalid_value", "job.suffix"),
        ({"job": {"validation_file": None}}, "missing_required_parameter", "job.validation_file"),
        ({"job": {"lora": {"init": "pissa"}}}, "invalid_value", "job.lora.init"),
        ({"job": {"hyperparameters": {"learning_rate": 1e-4}}}, "invalid_value",
         "job.method.supervised.hyperparameters.learning_rate"),
        ({"job": {"metadata": {str(k): "" for k in range(15)}}}, "invalid_value", "job.metadata"),
        ({"job": {"lora": {"use_dora": True}}}, "unsupported_combination", "grid.init[1]"),
        ({"job": {"model": "nothing"}}, "model_not_available", "job.model"),
        ({"objective": {"goal": "max"}}, "invalid_value", "objective.goal"),
        ({"max_parallel": 0}, "invalid_value", "max_parallel"),
        ({"unknown": 1}, "unknown_parameter", "unknown"),
    ],
)  # fmt: skip
def test_what_could_never_run_is_refused_before_any_job_exists(
    lab: Lab, change: dict[str, Any], code: str, param: str
) -> None:
    request = a_request(lab, **change)
    error = refused(lab.client.post(EXPERIMENTS, json=request), 400, code, param)
    assert lab.client.get(JOBS).json()["data"] == []
    assert error["message"]


def test_a_cell_that_could_never_run_is_named(lab: Lab, session: Session) -> None:
    request = a_request(lab)
    mark(session, request["job"]["training_file"], status="error", status_details="line 1 is no JSON")
    error = refused(lab.client.post(EXPERIMENTS, json=request), 400, "invalid_training_file", "job.training_file")
    assert "kaiming/0.0001/1" in error["message"]


def test_all_cells_or_none_fit_into_the_queue(lab: Lab, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("LORAINIT_PROJECT_QUEUED", "7")
    from api.core.settings import get_settings

    get_settings.cache_clear()
    refused(lab.client.post(EXPERIMENTS, json=a_request(lab)), 429, "queue_full")
    assert lab.client.get(JOBS).json()["data"] == []


def test_the_same_request_again_makes_no_second_experiment(lab: Lab) -> None:
    request, headers = a_request(lab), {"Idempotency-Key": "once"}
    first = lab.client.post(EXPERIMENTS, json=request, headers=headers)
    again = lab.client.post(EXPERIMENTS, json=request, headers=headers)
    assert again.json()["id"] == first.json()["id"]
    assert again.headers["idempotency-replayed"] == "true"
    assert len(lab.client.get(JOBS, params={"limit": 100}).json()["data"]) == 8


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


def test_ranks_are_an_axis_of_the_grid(lab: Lab) -> None:
    made = create(lab, grid={**GRID, "ranks": [4, 8], "learning_rates": [1e-4]})
    stub_worker.run_all(losses)
    shown = read(lab, made["id"])
    assert sorted((row["name"], row["r"]) for row in shown["results"]) == [
        ("kaiming r4", 4), ("kaiming r8", 8), ("pissa r4", 4), ("pissa r8", 8),
    ]  # fmt: skip


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


def halt(taken: Any, valid: stub_worker.Validation) -> None:
    """A run that reaches the step at which it has to wait: a tenth of its steps further each time."""
    job, lease = taken
    step = round(100 * (job.stop_after or 1.0))
    recorder = EventRecorder(lease)
    loss = valid(job, step)
    both = {"valid_loss": loss, "full_valid_loss": loss}
    recorder.add(Metrics(step=step, total_steps=100, epoch=1.0, tokens=step, seconds=float(step), **both))
    recorder.flush()
    outcomes.halt(lease, step)


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
                halt(taken, loss)
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
    halt(taken, losses_of_all)
    job = lab.client.get(f"{JOBS}/{taken[0].id}").json()
    assert job["status"] == "paused"
    assert lab.client.post(f"{JOBS}/{job['id']}/resume").json()["status"] == "queued"
    with session_scope() as session:
        assert session.get_one(Job, job["id"]).stop_after is None


def losses_of_all(job: Job, step: int) -> float:
    return 3.0 - 0.01 * step


def test_two_cells_are_not_halved(lab: Lab) -> None:
    request = a_request(lab, grid={**GRID, "learning_rates": [1e-4]}, schedule="halving")
    refused(lab.client.post(EXPERIMENTS, json=request), 400, "invalid_value", "schedule")


def run_to_its_end(lab: Lab, experiment_id: str, valid: stub_worker.Validation) -> dict[str, Any]:
    for _ in range(10):
        stub_worker.run_all(valid)
        shown = read(lab, experiment_id)
        if shown["status"] in ("succeeded", "failed"):
            return shown
    raise AssertionError("it never ended")


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


def test_a_grid_above_its_own_budget_is_refused(lab: Lab) -> None:
    error = refused(lab.client.post(EXPERIMENTS, json=a_request(lab, max_jobs=7)), 400, "invalid_value", "grid")
    assert "max_jobs, 7" in error["message"]
