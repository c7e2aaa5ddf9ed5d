"""A job can be ordered again from its own answer: method, hyperparameters and lora as they are shown."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import OpenAI
from sqlalchemy.orm import Session

from api.core.db.tables import Job
from api.schemas.job_request import JobRequest
from lorainit.config.inits import INITS
from lorainit.config.rates import RATES
from tests import stub_worker
from tests.api.conftest import JOBS, Lab, refused
from tests.things import MODEL, ON_ONE_DATABASE

pytestmark = pytest.mark.one_database
OPTIMIZERS = [
    {"name": "adamw"}, {"name": "adamw_preconditioned", "damping": 1e-3}, {"name": "adamw_lora_plus", "ratio": 4.0},
]  # fmt: skip
MORE_INITS = [{"method": "lora_one", "version": "v1"}, {"method": "pissa", "niter": None}]
TRAINING = st.fixed_dictionaries(
    {},
    optional={
        "n_epochs": st.integers(1, 50) | st.just("auto"),
        "batch_size": st.integers(1, 256),
        "learning_rate": st.floats(1e-8, 1),
        "optimizer": st.sampled_from(OPTIMIZERS),
        "max_steps": st.integers(1, 1000) | st.none(),
        "max_grad_norm": st.floats(0.1, 10) | st.none(),
        "weight_decay": st.floats(0, 1),
        "warmup_ratio": st.floats(0, 0.5),
        "max_length": st.integers(8, 8192),
        "precision": st.sampled_from(["auto", "fp32", "bf16"]),
    },
)
LORA = st.fixed_dictionaries(
    {"init": st.sampled_from([*INITS, "auto", *MORE_INITS])},
    optional={
        "r": st.sampled_from([2, 8, 16, 64]),
        "alpha": st.floats(0.5, 512) | st.just("auto"),
        "use_rslora": st.booleans(),
        "target_modules": st.sampled_from(["all-linear", "attention", "mlp", ["q_proj", "down_proj"]]),
    },
)


def shown(lab: Lab, job: dict[str, Any]) -> dict[str, Any]:
    reply: dict[str, Any] = lab.client.get(f"{JOBS}/{job['id']}").json()
    return reply


def run_of(session: Session, job: dict[str, Any]) -> dict[str, Any]:
    """All that the run of a job is made from; an `init.seed` of null means the job's."""
    row = session.get_one(Job, job["id"], populate_existing=True)
    lora = {key: value for key, value in row.recipe["lora"].items() if key != "left_out"}
    lora["init"] = {**lora["init"], "seed": row.seed if lora["init"]["seed"] is None else lora["init"]["seed"]}
    return {"lora": lora, "training": row.recipe["training"], "seed": row.seed, "files": row.training_file_id}


def again(lab: Lab, answer: dict[str, Any]) -> dict[str, Any]:
    return lab.order(
        answer["training_file"],
        seed=answer["seed"], method=answer["method"], hyperparameters=answer["hyperparameters"], lora=answer["lora"],
    )  # fmt: skip


@ON_ONE_DATABASE
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(training=TRAINING, lora=LORA)
def test_a_job_ordered_from_an_answer_is_the_same_run(
    lab: Lab, session: Session, training: dict[str, Any], lora: dict[str, Any]
) -> None:
    if lora["init"] == "loftq":
        lora = {**lora, "quantization": "nf4"}
    method = {"type": "supervised", "supervised": {"hyperparameters": training}}
    first = lab.order(lora=lora, method=method, seed=7)
    early = again(lab, first)  # before anything is resolved
    stub_worker.tidy()
    late = again(lab, shown(lab, first))
    stub_worker.tidy()
    wanted = run_of(session, first)
    assert wanted["training"]["learning_rate"] is not None
    assert run_of(session, early) == wanted
    assert run_of(session, late) == wanted


def test_an_answer_of_the_official_client_can_be_ordered_again(lab: Lab, session: Session) -> None:
    with OpenAI(base_url=f"{lab.client.base_url}/v1", api_key=lab.secret, http_client=lab.client) as client:
        jobs = client.fine_tuning.jobs
        file = lab.upload()["id"]
        first = jobs.create(model=MODEL, training_file=file, extra_body={"lora": {"init": "lora_ga", "r": 8}})
        stub_worker.run_all()
        done: Any = jobs.retrieve(first.id)
        second = jobs.create(
            model=done.model, training_file=file, seed=done.seed, method=done.method,
            hyperparameters=done.hyperparameters, extra_body={"lora": done.lora},
        )  # fmt: skip
        stub_worker.tidy()
        chosen = {"precision": "fp32"}  # by the machine, in the stub's run
        wanted, found = (run_of(session, {"id": job.id}) for job in (first, second))
        assert found == {**wanted, "training": wanted["training"] | chosen}


def test_a_scale_that_would_not_be_trained_with_is_refused(lab: Lab) -> None:
    body = {"model": MODEL, "training_file": lab.upload()["id"], "lora": {"r": 8, "alpha": 16.0, "scaling": 3.0}}
    refused(lab.client.post(JOBS, json=body), 400, "invalid_value", "lora.scaling")


def test_a_multiplier_that_does_not_fit_the_rate_is_refused_with_the_base_rate(lab: Lab) -> None:
    rates = {"learning_rate": 1e-4, "learning_rate_multiplier": 2.0}
    method = {"type": "supervised", "supervised": {"hyperparameters": rates}}
    body = {"model": MODEL, "training_file": lab.upload()["id"], "method": method, "lora": {"init": "pissa"}}
    found = lab.client.post(JOBS, json=body)
    refused(found, 400, "invalid_value", "method.supervised.hyperparameters.learning_rate_multiplier")
    assert f"initialization is {RATES['pissa'][0].value:g}" in found.json()["error"]["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("modules", 1), ("trainable_parameters", 1), ("rank_pattern", {"model.layers.0.self_attn.q_proj": 1})],
)
def test_an_answer_that_was_edited_is_refused_with_its_field(field: str, value: Any, lab: Lab) -> None:
    first = lab.order(lora={"init": "kaiming", "r": 8})
    body = {"model": MODEL, "training_file": first["training_file"], "lora": {**first["lora"], field: value}}
    refused(lab.client.post(JOBS, json=body), 400, "invalid_value", f"lora.{field}")


@pytest.mark.parametrize(
    ("ranks", "accepted"),
    [
        ({"model.layers.0.self_attn.q_proj": 12, "model.layers.1.self_attn.q_proj": 4}, True),
        ({"q_proj": 1}, False),
        ({"model.layers.0.self_attn.q_proj": 64}, False),
        ({"model.layers.0.self_attn.nothing": 4}, False),
    ],
)
def test_ranks_are_taken_only_as_the_answer_of_a_method_that_spreads_them(
    ranks: dict[str, int], accepted: bool, lab: Lab
) -> None:
    body = {"model": MODEL, "training_file": lab.upload()["id"], "lora": {"init": "eva", "r": 8, "rank_pattern": ranks}}
    found = lab.client.post(JOBS, json=body)
    if accepted:
        assert found.status_code == 200
    else:
        refused(found, 400, "invalid_value", "lora.rank_pattern")


@pytest.mark.parametrize("field", ["modules", "trainable_parameters"])
def test_what_an_order_came_to_is_no_part_of_the_order(field: str) -> None:
    request = JobRequest.model_validate({"model": "m", "training_file": "f", "lora": {"r": 8, field: 3}})
    assert not hasattr(request.order().lora, field)
