"""What an experiment is refused for, before any of its jobs exists."""

from typing import Any

import pytest
from sqlalchemy.orm import Session

from tests.api.conftest import JOBS, Lab, mark, refused
from tests.api.routes.compared import EXPERIMENTS, GRID, a_request

pytestmark = pytest.mark.one_database


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


def test_two_cells_are_not_halved(lab: Lab) -> None:
    request = a_request(lab, grid={**GRID, "learning_rates": [1e-4]}, schedule="halving")
    refused(lab.client.post(EXPERIMENTS, json=request), 400, "invalid_value", "schedule")


def test_a_grid_above_its_own_budget_is_refused(lab: Lab) -> None:
    error = refused(lab.client.post(EXPERIMENTS, json=a_request(lab, max_jobs=7)), 400, "invalid_value", "grid")
    assert "max_jobs, 7" in error["message"]
