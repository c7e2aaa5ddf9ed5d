"""`lora.init: "auto"`: chosen by what candidates show on the job's own rows, by an earlier experiment, or by rule."""

from typing import Any

import pytest
from sqlalchemy import select, update

from api.core.db.database import now, session_scope
from api.core.db.tables import Experiment, Job, Metric
from api.core.experiments.auto import history
from api.core.jobs import checkpoints
from api.core.models import catalogue
from tests import stub_worker
from tests.api.conftest import JOBS, JSONL, Lab
from tests.api.routes.compared import EXPERIMENTS, create, losses, read, run_to_its_end
from tests.things import MODEL
from worker import reconciler

STEPS = 128
RATE = "method.supervised.hyperparameters.learning_rate"
QUALITY = {"kaiming": 0.1, "loram": 0.2, "lora_one": 0.0, "eva": 0.3}


def order(lab: Lab, *, steps: int = STEPS, init: Any = "auto", **fields: Any) -> dict[str, Any]:
    training = {"max_steps": steps, "batch_size": 4, **fields.pop("training", {})}
    body = {
        "model": MODEL,
        "training_file": lab.upload()["id"],
        "validation_file": lab.upload(JSONL * 2)["id"],
        "method": {"type": "supervised", "supervised": {"hyperparameters": training}},
        "lora": {"r": 8, "init": init},
        **fields,
    }
    reply = lab.client.post(JOBS, json={key: value for key, value in body.items() if value is not None})
    assert reply.status_code == 200, reply.text
    return reply.json()


def show(lab: Lab, job: dict[str, Any]) -> dict[str, Any]:
    return lab.client.get(f"{JOBS}/{job['id']}").json()


def quality(job: Job, step: int) -> float:
    """lora_one is the best, at any rate."""
    return 3.0 - 0.01 * step + QUALITY[job.recipe["lora"]["init"]["method"]]


def work(valid: stub_worker.Validation = quality, *, until: str | None = None) -> list[str]:
    """Run whatever waits, with the reconciler between; the ids of the jobs in the order of their runs.

    `until`: a job that is only claimed, and ends this.
    """
    ran = []
    for _ in range(4):
        stub_worker.tidy()
        while (taken := stub_worker.claim()) is not None:
            ran.append(taken[0].id)
            if taken[0].id == until:
                return ran
            if taken[0].stop_after is None:
                stub_worker.train(*taken, steps=STEPS, valid=valid)
            else:
                stub_worker.halt(*taken, steps=STEPS, valid=valid)
        while reconciler.advance_experiments():
            pass
    return ran


def chosen(shown: dict[str, Any]) -> dict[str, Any]:
    return {choice["param"]: choice for choice in shown["lora"]["auto"]}


def test_the_best_candidate_is_chosen_and_the_job_goes_on_from_its_checkpoint(lab: Lab) -> None:
    job = order(lab)
    assert job["lora"]["init"]["method"] == "auto" and job["lora"]["scaling"] is None
    assert work(until=job["id"])[-1] == job["id"]
    shown = show(lab, job)
    assert shown["status"] == "running"
    assert shown["lora"]["init"]["method"] == "lora_one"
    assert "lora_one" in chosen(shown)["lora.init"]["reason"]
    experiment = read(lab, shown["experiment_id"])
    assert (experiment["status"], experiment["schedule"]) == ("succeeded", "probe")
    looks = [decision["step"] for decision in experiment["decisions"]]
    with session_scope() as session:
        steps = session.scalars(select(Metric.step).where(Metric.job_id == job["id"]).order_by(Metric.step)).all()
        last = checkpoints.find_latest(session, job["id"])
    assert steps == looks
    assert last is not None and last.step == looks[-1]
    assert last.name.endswith(f":{job['id'][6:14]}:ckpt-step-{last.step}")
    assert job["id"] not in last.state_key  # these are the candidate's bytes


def test_candidates_cost_at_most_a_quarter_of_the_jobs_steps(lab: Lab) -> None:
    job = order(lab)
    work(until=job["id"])
    events = lab.client.get(f"{JOBS}/{job['id']}/events?limit=100").json()["data"]
    data = next(event["data"] for event in events if event["data"].get("kind") == "init_choice")
    assert 0 < data["steps"] <= STEPS // 4
    assert {one["init"] for one in data["candidates"]} >= {"kaiming", "loram", "lora_one"}
    assert data["candidates"][0]["init"] == "lora_one"
    assert all(one["valid_loss"] is not None for one in data["candidates"])


def test_candidates_are_jobs_of_the_same_seed_and_rows_and_name_the_job(lab: Lab) -> None:
    job = order(lab, seed=17)
    stub_worker.tidy()
    tried = [one for one in lab.client.get(JOBS).json()["data"] if one["id"] != job["id"]]
    assert len(tried) == 4
    assert {(one["seed"], one["training_file"], one["metadata"]["chosen_for"]) for one in tried} == {
        (17, job["training_file"], job["id"])
    }
    waiting = show(lab, job)
    assert waiting["status"] == "validating_files" and waiting["experiment_id"] in waiting["queue_reason"]


def test_if_nothing_separates_beyond_noise_the_cheapest_is_taken(lab: Lab) -> None:
    job = order(lab)
    work(lambda job, step: 3.0 - 0.01 * step + 0.01 * QUALITY[job.recipe["lora"]["init"]["method"]])
    assert show(lab, job)["lora"]["init"]["method"] == "kaiming"


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"validation_file": None}, "without a validation file"),
        ({"steps": 20}, "too short"),
        ({"init": {"method": "auto", "probe_steps": 3}}, "too short"),
    ],
)
def test_where_nothing_can_be_tried_the_rule_chooses_and_says_why(lab: Lab, fields: Any, why: str) -> None:
    job = order(lab, **fields)
    stub_worker.tidy()
    shown = show(lab, job)
    assert shown["status"] == "queued" and shown["experiment_id"] is None
    assert why in chosen(shown)["lora.init"]["reason"]
    assert shown["lora"]["init"]["method"] == "loram"


def test_a_given_rate_is_kept_and_only_initializations_are_tried(lab: Lab) -> None:
    job = order(lab, training={"learning_rate": 5e-4})
    work()
    shown = show(lab, job)
    assert shown["method"]["supervised"]["hyperparameters"]["learning_rate"] == 5e-4
    assert shown["lora"]["init"]["method"] == "lora_one"
    experiment = read(lab, shown["experiment_id"])
    assert {cell["learning_rate"] for cell in experiment["decisions"][0]["cells"]} == {5e-4}


def test_the_caller_may_name_the_candidates(lab: Lab) -> None:
    job = order(lab, init={"method": "auto", "candidates": ["eva", "loram"]})
    work()
    shown = show(lab, job)
    assert shown["lora"]["init"]["method"] == "loram"
    assert [init["method"] for init in read(lab, shown["experiment_id"])["grid"]["init"]] == ["eva", "loram"]


@pytest.mark.parametrize(
    ("lora", "param"),
    [
        ({"init": {"method": "auto", "candidates": ["kaiming", "nope"]}}, "lora.init.candidates"),
        ({"init": {"method": "auto", "candidates": ["kaiming", "kaiming"]}}, "lora.init.candidates"),
        ({"init": {"method": "auto", "candidates": ["kaiming"]}}, "lora.init.candidates"),
        ({"init": {"method": "auto", "candidates": ["kaiming", "hrp"]}}, "lora.init.candidates"),
        ({"init": {"method": "auto", "candidates": ["kaiming", "pissa"]}, "use_dora": True}, "lora.init.candidates"),
        ({"init": {"method": "auto", "candidates": ["kaiming", "orthogonal"]}, "r": 7}, "lora.init.candidates"),
        ({"init": {"method": "auto", "probe_steps": 0}}, "lora.init.probe_steps"),
        ({"init": {"method": "auto", "seed": 3}}, "lora.init.seed"),
    ],
)
def test_wrong_candidates_are_refused_at_once(lab: Lab, lora: Any, param: str) -> None:
    body = {"model": MODEL, "training_file": lab.upload()["id"], "lora": lora}
    reply = lab.client.post(JOBS, json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param, reply.text


def test_an_answer_can_be_sent_back_before_and_after_the_choice(lab: Lab) -> None:
    job = order(lab)
    again = {key: job[key] for key in ("model", "training_file", "validation_file", "method", "lora")}
    assert lab.client.post(JOBS, json=again).status_code == 200
    work()
    shown = show(lab, job)
    again = {key: shown[key] for key in ("model", "training_file", "validation_file", "method", "lora")}
    reply = lab.client.post(JOBS, json=again)
    assert reply.status_code == 200, reply.text
    assert reply.json()["lora"]["init"]["method"] == "lora_one"


def test_a_cancelled_job_cancels_its_candidates(lab: Lab) -> None:
    job = order(lab)
    stub_worker.tidy()
    assert lab.client.post(f"{JOBS}/{job['id']}/cancel").json()["status"] == "cancelled"
    while reconciler.advance_experiments():
        pass
    assert work() == []
    statuses = {one["status"] for one in lab.client.get(JOBS).json()["data"]}
    assert statuses == {"cancelled"}
    assert read(lab, show(lab, job)["experiment_id"])["status"] == "cancelled"


def test_a_paused_job_pauses_its_candidates_and_a_resumed_one_resumes_them(lab: Lab) -> None:
    job = order(lab)
    stub_worker.tidy()
    assert lab.client.post(f"{JOBS}/{job['id']}/pause").json()["status"] == "paused"
    while reconciler.advance_experiments():
        pass
    assert {one["status"] for one in lab.client.get(JOBS).json()["data"]} == {"paused"}
    assert lab.client.post(f"{JOBS}/{job['id']}/resume").json()["status"] == "validating_files"
    while reconciler.advance_experiments():
        pass
    work()
    assert show(lab, job)["status"] == "succeeded"


def test_if_its_experiment_is_cancelled_the_rule_chooses(lab: Lab) -> None:
    job = order(lab)
    stub_worker.tidy()
    experiment = show(lab, job)["experiment_id"]
    assert lab.client.post(f"{EXPERIMENTS}/{experiment}/cancel").status_code == 200
    work()
    shown = show(lab, job)
    assert shown["status"] == "succeeded"
    assert "was cancelled" in chosen(shown)["lora.init"]["reason"]


def test_if_every_candidate_fails_the_rule_chooses_and_names_the_codes(lab: Lab) -> None:
    job = order(lab)
    stub_worker.tidy()
    while (taken := stub_worker.claim()) is not None:
        stub_worker.fail(taken[1])
    while reconciler.advance_experiments():
        pass
    stub_worker.tidy()
    shown = show(lab, job)
    assert shown["status"] == "queued"
    assert "out_of_memory" in chosen(shown)["lora.init"]["reason"]


def test_if_no_candidate_has_a_finite_loss_the_rule_chooses(lab: Lab) -> None:
    job = order(lab)
    work(lambda _job, _step: None, until=job["id"])
    shown = show(lab, job)
    assert "finite" in chosen(shown)["lora.init"]["reason"]
    assert read(lab, shown["experiment_id"])["status"] == "failed"


def test_a_candidate_that_fails_drops_out(lab: Lab) -> None:
    job = order(lab)
    stub_worker.tidy()
    taken = stub_worker.claim()
    assert taken is not None
    stub_worker.fail(taken[1])
    work()
    assert show(lab, job)["status"] == "succeeded"
    assert show(lab, job)["lora"]["init"]["method"] == "lora_one"


def test_a_job_that_chooses_does_not_use_up_the_places_of_other_jobs(lab: Lab) -> None:
    first, second = order(lab), order(lab, init="pissa")
    stub_worker.tidy()
    assert show(lab, second)["status"] == "queued"
    assert show(lab, first)["status"] == "validating_files"


def test_a_model_that_leaves_the_catalogue_before_the_choice_fails_the_job(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = order(lab)
    with monkeypatch.context() as patch:
        patch.setattr(catalogue, "find", lambda _name: None)
        stub_worker.tidy()
    shown = show(lab, job)
    assert (shown["status"], shown["error"]["code"]) == ("failed", "unsupported_model")


def test_an_earlier_experiment_on_the_same_rows_decides(lab: Lab) -> None:
    training = {"max_steps": 3, "batch_size": 4}
    method = {"type": "supervised", "supervised": {"hyperparameters": training}}
    made = create(lab, job={"method": method})
    ended = run_to_its_end(lab, made["id"], losses)
    best = ended["results"][0]
    for _ in range(history.LOOKED_AT):  # newer experiments that only chose for a job say nothing
        order(lab)
    stub_worker.tidy()
    with session_scope() as session:
        session.execute(update(Experiment).values(status="succeeded", finished_at=now(session)))
        session.commit()
    job = order(lab, steps=6, training_file=made["job"]["training_file"])
    stub_worker.tidy()
    shown = show(lab, job)
    assert shown["lora"]["init"]["method"] == best["name"]
    assert made["id"] in chosen(shown)["lora.init"]["reason"]
    assert shown["method"]["supervised"]["hyperparameters"]["learning_rate"] == best["learning_rate"]


def test_the_report_of_what_was_tried_shows_it_and_has_no_request_to_repeat(lab: Lab) -> None:
    job = order(lab)
    work(until=job["id"])
    page = lab.client.get(f"{EXPERIMENTS}/{show(lab, job)['experiment_id']}/report").text
    assert "lora_one at 0.001: validation loss" in page
    assert "To repeat it" not in page
