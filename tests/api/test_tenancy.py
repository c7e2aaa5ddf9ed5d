"""No project sees another's objects: every route of the table, with another project's ids."""

import re
from typing import Any

import pytest
from sqlalchemy.orm import Session

from api.main import create_app
from tests import stub_worker
from tests.api.conftest import JOBS, Lab
from tests.things import MODEL

CODES = {"file_not_found", "fine_tune_not_found", "model_not_found"}
PUBLIC = {"/healthz", "/readyz"}


@pytest.fixture
def theirs(stranger: Lab, session: Session) -> dict[str, str]:
    """Ids of everything another project owns, by the name of the path parameter."""
    job = stranger.order()
    stub_worker.run_all()
    shown = stranger.client.get(f"{JOBS}/{job['id']}").json()
    return {
        "file_id": shown["training_file"],
        "fine_tuning_job_id": job["id"],
        "model:path": shown["fine_tuned_model"],
        "method": "pissa",
    }


def test_every_route_hides_what_belongs_to_another_project(lab: Lab, stranger: Lab, theirs: dict[str, str]) -> None:
    before = [stranger.client.get(path).json() for path in ("/v1/files", JOBS, "/v1/models")]
    walked = 0
    for route in create_app().state.table.routes:
        names = re.findall(r"\{(.*?)\}", route.path)
        if not names or names == ["method"]:
            continue
        path = re.sub(r"\{(.*?)\}", lambda match: theirs[match[1]], route.path)
        for verb in route.methods:
            reply = lab.client.request(verb, path)
            assert reply.status_code == 404, (verb, path)
            if verb != "HEAD":
                assert reply.json()["error"]["code"] in CODES
            walked += 1
    assert walked >= 12
    assert [stranger.client.get(path).json() for path in ("/v1/files", JOBS, "/v1/models")] == before


def test_lists_hold_ones_own_only(lab: Lab, theirs: dict[str, str]) -> None:
    assert lab.client.get("/v1/files").json()["data"] == []
    assert lab.client.get(JOBS).json()["data"] == []
    assert [model["id"] for model in lab.client.get("/v1/models").json()["data"]] == [MODEL]


def test_a_foreign_cursor_is_refused(lab: Lab, theirs: dict[str, str]) -> None:
    for path in (f"/v1/files?after={theirs['file_id']}", f"{JOBS}?after={theirs['fine_tuning_job_id']}"):
        assert lab.client.get(path).json()["error"]["param"] == "after"


def test_every_route_but_health_asks_for_a_key(lab: Lab, theirs: dict[str, str]) -> None:
    for route in create_app().state.table.routes:
        if route.path in PUBLIC:
            continue
        path = re.sub(r"\{(.*?)\}", lambda match: theirs[match[1]], route.path)
        for verb in route.methods:
            reply: Any = lab.client.request(verb, path, headers={"authorization": ""})
            assert reply.status_code == 401, (verb, path)
