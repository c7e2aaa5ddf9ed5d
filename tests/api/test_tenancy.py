"""No project sees another's objects: every route, query value and body field, with another project's ids.

Routes come from the application itself and parameters from its OpenAPI document. What nobody here
knows how to fill fails the test, so a new route is either covered or noticed.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
from sqlalchemy.orm import Session
from starlette.routing import Route

from api.core.access import keys
from tests import stub_worker
from tests.api.conftest import JOBS, JSONL, Lab
from tests.things import MODEL

pytestmark = pytest.mark.one_database
PUBLIC = {"/healthz", "/readyz", "/metrics", "/openapi.json"}
EXPERIMENTS = "/v1/experiments"
# Path and query parameters that name nothing a project owns.
PLAIN = {"method", "limit", "purpose", "order", "r", "idempotency-key"}
# JSON bodies by path: what is sent, and the fields in it that name something of a project.
BODIES: Mapping[str, tuple[dict[str, Any], Sequence[str]]] = {
    JOBS: (
        {"model": MODEL, "training_file": "own"},
        ("model", "training_file", "validation_file", "lora.init.calibration_file"),
    ),
    EXPERIMENTS: (
        {
            "name": "compared",
            "job": {"model": MODEL, "training_file": "own", "validation_file": "own 2"},
            "grid": {"init": ["kaiming"], "learning_rates": [1e-4], "seeds": [1]},
        },
        ("job.model", "job.training_file", "job.validation_file", "grid.init.calibration_file"),
    ),
    "/v1/organization/projects/{project_id}/api_keys": ({"name": "another"}, ()),
}
# Where an unknown position means the beginning.
FROM_THE_START = {JOBS + "/{fine_tuning_job_id}/events/stream"}
WORDS = ("swordfish",)  # what strangers call their things


@dataclass
class Things:
    """One of everything a project owns: ids by the name of the path parameter."""

    ids: dict[str, list[str]]

    def every(self) -> list[str]:
        return [one for several in self.ids.values() for one in several]


def things_of(lab: Lab, session: Session, *, suffix: str) -> Things:
    rows, valid = lab.upload()["id"], lab.upload(JSONL * 2)["id"]
    grid = {"init": ["kaiming"], "learning_rates": [1e-4], "seeds": [1]}
    cell = {"model": MODEL, "training_file": rows, "validation_file": valid}
    made = lab.client.post(EXPERIMENTS, json={"name": suffix, "job": cell, "grid": grid})
    assert made.status_code == 200, made.text
    job = lab.order(rows, suffix=suffix, metadata={"note": suffix})["id"]
    stub_worker.run_all()
    shown = lab.client.get(f"{JOBS}/{job}").json()
    assert shown["status"] == "succeeded"
    (checkpoint,) = lab.client.get(f"{JOBS}/{job}/checkpoints").json()["data"]
    events = lab.client.get(f"{JOBS}/{job}/events").json()["data"]
    key, _ = keys.create_key(session, lab.project, name=suffix)
    session.commit()
    ids = {
        "file_id": [rows, valid, *shown["result_files"]],
        "fine_tuning_job_id": [job],
        "experiment_id": [made.json()["id"]],
        "model": [shown["fine_tuned_model"], checkpoint["fine_tuned_model_checkpoint"]],
        "checkpoint": [checkpoint["id"]],
        "event": [events[0]["id"]],
        "project_id": [lab.project.id],
        "key_id": [key.id],
    }
    return Things(ids)


@pytest.fixture
def theirs(stranger: Lab, session: Session) -> Things:
    return things_of(stranger, session, suffix=WORDS[0])


@pytest.fixture
def mine(admin: Lab, session: Session, theirs: Things) -> Things:
    return things_of(admin, session, suffix="own")


def every_route(routes: Sequence[Any]) -> Iterator[Route]:
    """The routes of an application."""
    for route in routes:
        assert isinstance(route, Route), "a kind of route that nobody has thought of here"
        yield route


def parameters(path: str) -> list[str]:
    return [name.partition(":")[0] for name in re.findall(r"\{(.*?)\}", path)]


def fill(path: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\{(.*?)\}", lambda match: values[match[1].partition(":")[0]], path)


def never_was(some_id: str) -> str:
    """An id of the same form that belongs to nobody."""
    return some_id[:-8] + "00000000"


def assert_hidden(lab: Lab, verb: str, path: str, foreign: str, **request: Any) -> None:
    """A foreign id is refused in the very words in which one that never was is refused."""
    reply = lab.client.request(verb, path, **request)
    assert reply.status_code in (400, 404), (verb, path, reply.text)
    if verb == "HEAD":
        return
    assert not any(word in reply.text.replace(foreign, "") for word in WORDS), reply.text

    def other(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: other(item) for key, item in value.items()}
        if isinstance(value, list):
            return [other(item) for item in value]
        return value.replace(foreign, never_was(foreign)) if isinstance(value, str) else value

    unknown = lab.client.request(verb, other(path), **other(request))
    assert unknown.status_code == reply.status_code, (verb, path)
    assert unknown.json() == other(reply.json())


def assert_passed_over(lab: Lab, verb: str, path: str, foreign: str, **request: Any) -> None:
    """A foreign id changes nothing of the answer."""
    plain, reply = lab.client.request(verb, path), lab.client.request(verb, path, **request)
    assert (reply.status_code, reply.text) == (plain.status_code, plain.text), (verb, path, foreign)


def assert_finds_nothing(lab: Lab, verb: str, path: str, _foreign: str, **request: Any) -> None:
    """A foreign id is looked for, and nothing has it."""
    assert lab.client.request(verb, path, **request).json()["data"] == []


def holes(body: dict[str, Any], field: str, value: str) -> dict[str, Any]:
    """`body` with `value` at the dotted `field`."""
    if field == "lora.init.calibration_file":
        return {**body, "lora": {"init": {"method": "eva", "calibration_file": value}}}
    if field == "grid.init.calibration_file":
        return {**body, "grid": {**body["grid"], "init": [{"method": "eva", "calibration_file": value}]}}
    if field.startswith("job."):
        return {**body, "job": {**body["job"], field.removeprefix("job."): value}}
    return {**body, field: value}


def own_files(value: Any, files: Sequence[str]) -> Any:
    """`value` with one's own files where "own" and "own 2" stand, at any depth."""
    if isinstance(value, dict):
        return {key: own_files(item, files) for key, item in value.items()}
    return {"own": files[0], "own 2": files[1]}.get(value, value) if isinstance(value, str) else value


def test_every_route_hides_what_belongs_to_another_project(
    app: Any, admin: Lab, stranger: Lab, theirs: Things, mine: Things
) -> None:
    looks = ["/v1/files", JOBS, EXPERIMENTS, "/v1/models", f"/v1/organization/projects/{stranger.project.id}/api_keys"]
    before = [stranger.client.get(path).json() for path in looks]
    walked = set()
    for route in every_route(app.routes):
        names = [name for name in parameters(route.path) if name not in PLAIN]
        for name in names:
            for foreign in theirs.ids[name]:  # KeyError: say in `things_of` what the new parameter is
                values = {**{other: mine.ids[other][0] for other in names}, name: foreign}
                for verb in route.methods or ():
                    assert_hidden(admin, verb, fill(route.path, values), foreign)
                    walked.add((verb, route.path))
    assert len(walked) >= 16
    assert [stranger.client.get(path).json() for path in looks] == before


def test_a_query_value_reaches_nothing_of_another_project(app: Any, admin: Lab, theirs: Things, mine: Things) -> None:
    own = {name: values[0] for name, values in mine.ids.items()} | {"method": "pissa"}
    walked = set()
    for path, operations in app.openapi()["paths"].items():
        for verb, operation in operations.items():
            names = [one["name"] for one in operation.get("parameters", []) if one["in"] == "query"]
            for name, foreign in product(set(names) - PLAIN, theirs.every()):
                assert name in ("after", "checkpoint", "model", "search"), f"{verb} {path}: what is {name}?"
                look = assert_passed_over if path in FROM_THE_START else assert_hidden
                look = assert_finds_nothing if name == "search" else look
                look(admin, verb.upper(), fill(path, own), foreign, params={name: foreign})
                walked.add((path, name))
    assert len(walked) >= 8


def test_a_body_reaches_nothing_of_another_project(app: Any, admin: Lab, theirs: Things, mine: Things) -> None:
    own = {name: values[0] for name, values in mine.ids.items()}
    for path, operations in app.openapi()["paths"].items():
        for verb, operation in operations.items():
            if "application/json" not in operation.get("requestBody", {}).get("content", {}):
                continue
            body, fields = BODIES[path]  # KeyError: say there which of the new body's fields name something
            body = own_files(body, mine.ids["file_id"])
            for field, foreign in product(fields, theirs.every()):
                assert_hidden(admin, verb.upper(), fill(path, own), foreign, json=holes(body, field, foreign))


def test_every_hidden_route_is_the_head_of_a_documented_one(app: Any) -> None:
    documented = {(verb.upper(), path) for path, operations in app.openapi()["paths"].items() for verb in operations}
    routes = [route for route in every_route(app.routes) if route.path not in PUBLIC]
    every = {(verb, route.path.replace(":path", "")) for route in routes for verb in route.methods or ()}
    assert {("GET", path) for verb, path in every - documented if verb == "HEAD"} <= documented
    assert {verb for verb, _ in every - documented} <= {"HEAD"}


def test_no_route_takes_a_key_for_another_project(app: Any, admin: Lab, stranger: Lab, mine: Things) -> None:
    own = {name: values[0] for name, values in mine.ids.items()} | {"method": "pissa"}
    for route in every_route(app.routes):
        if route.path in PUBLIC:
            continue
        for verb in route.methods or ():
            reply = admin.client.request(verb, fill(route.path, own), headers={"openai-project": stranger.project.id})
            assert reply.status_code == 401, (verb, route.path)


def test_every_route_but_the_public_ones_asks_for_a_key(app: Any, admin: Lab, mine: Things) -> None:
    own = {name: values[0] for name, values in mine.ids.items()} | {"method": "pissa"}
    for route in every_route(app.routes):
        if route.path in PUBLIC:
            continue
        for verb in route.methods or ():
            reply = admin.client.request(verb, fill(route.path, own), headers={"authorization": ""})
            assert reply.status_code == 401, (verb, route.path)


def test_lists_hold_ones_own_only(lab: Lab, theirs: Things) -> None:
    assert lab.client.get("/v1/files").json()["data"] == []
    assert lab.client.get(JOBS).json()["data"] == []
    assert [model["id"] for model in lab.client.get("/v1/models").json()["data"]] == [MODEL]
