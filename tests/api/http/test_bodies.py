"""What a JSON body may hold is bounded, what is wrong with a large one is a handful of faults, and the loop goes on."""

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from api import errors
from api.app import create_app
from api.http import bodies
from api.schemas.job_request import JobRequest
from tests.api.conftest import JOBS, Lab, refused
from tests.things import MODEL

pytestmark = pytest.mark.one_database
ORDER = {"model": MODEL, "training_file": "file-x"}
KEYS = {f"k{number}": 1 for number in range(20_000)}
NUMBERS = [1] * 50_000

HOSTILE: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown fields": (KEYS, "unknown_parameter", "k0"),
    "integrations": ({"integrations": NUMBERS}, "invalid_type", "integrations[0]"),
    "tags": (
        {"integrations": [{"type": "wandb", "wandb": {"project": "p", "tags": NUMBERS}}]},
        "invalid_type",
        "integrations[0].wandb.tags[0]",
    ),
    "metadata": ({"metadata": KEYS}, "invalid_value", "metadata"),
    "unknown fields of lora": ({"lora": KEYS}, "unknown_parameter", "lora.k0"),
    "of an init": ({"lora": {"init": {"method": "pissa", **KEYS}}}, "unknown_parameter", "lora.init.k0"),
    "ranks": ({"lora": {"rank_pattern": dict.fromkeys(KEYS, "x")}}, "invalid_value", "lora.rank_pattern"),
    "many ranks": (
        {"lora": {"rank_pattern": {str(number): 1 for number in range(70_000)}}},
        "invalid_value",
        "lora.rank_pattern",
    ),
    "target modules": ({"lora": {"target_modules": NUMBERS}}, "invalid_value", "lora.target_modules"),
    "left out": (
        {"lora": {"left_out": [{"paths": [1] * 500}] * 500}},
        "missing_required_parameter",
        "lora.left_out[0].name",
    ),
    "choices": ({"lora": {"auto": NUMBERS}}, "invalid_type", "lora.auto[0]"),
    "a list for a name": ({"model": NUMBERS}, "invalid_type", "model"),
    "hyperparameters": ({"hyperparameters": KEYS}, "unknown_parameter", "hyperparameters.k0"),
    "resources": ({"resources": KEYS}, "unknown_parameter", "resources.k0"),
}


# --- every schema --------------------------------------------------------------------------------


def unbounded(schema: dict[str, Any], components: dict[str, Any], at: str) -> Iterator[str]:
    """Places below a schema where a list, a map or a string may be as large as its sender likes."""
    if reference := schema.get("$ref"):
        yield from unbounded(components[reference.rpartition("/")[2]], components, at)
        return
    alternatives = [one for word in ("anyOf", "oneOf", "allOf") for one in schema.get(word, [])]
    for one in alternatives:
        yield from unbounded(one, components, at)
    kind = schema.get("type")
    if kind == "array":
        if "maxItems" not in schema:
            yield f"{at}: list"
        yield from unbounded(schema.get("items", {}), components, f"{at}[]")
    elif kind == "object":
        others = schema.get("additionalProperties", True)
        if others is not False and "maxProperties" not in schema:
            yield f"{at}: map"
        if isinstance(others, dict):
            yield from unbounded(others, components, f"{at}.*")
        for name, one in schema.get("properties", {}).items():
            yield from unbounded(one, components, f"{at}.{name}")
    elif kind == "string":
        # The bytes of an upload are counted as they come in.
        if not {"maxLength", "enum", "const", "contentMediaType"} & schema.keys():
            yield f"{at}: string"
    elif kind is None and not alternatives and "const" not in schema and "enum" not in schema:
        yield f"{at}: anything"


def test_every_list_map_and_string_that_a_request_may_hold_is_bounded() -> None:
    document = create_app().openapi()
    components, found, bodies_seen = document["components"]["schemas"], list[str](), 0
    for path, verbs in document["paths"].items():
        for verb, operation in verbs.items():
            # A path is bounded by the server, and one that is too long names nothing: 404.
            for one in operation.get("parameters", []):
                if one["in"] != "path":
                    found += unbounded(one["schema"], components, f"{verb} {path} {one['name']}")
            for content in operation.get("requestBody", {}).get("content", {}).values():
                bodies_seen += 1
                found += unbounded(content["schema"], components, f"{verb} {path}")
    assert bodies_seen == 4
    assert found == []


@pytest.mark.parametrize(
    ("schema", "found"),
    [
        ({"type": "array", "items": {"type": "integer"}}, ["x: list"]),
        ({"type": "object", "maxProperties": 2, "additionalProperties": {"type": "string"}}, ["x.*: string"]),
        ({"anyOf": [{"type": "object"}, {"type": "null"}]}, ["x: map"]),
        ({"type": "object", "additionalProperties": False, "properties": {"a": {}}}, ["x.a: anything"]),
        ({"$ref": "#/components/schemas/A"}, ["x: string"]),
    ],
)
def test_what_is_unbounded_is_found(schema: dict[str, Any], found: list[str]) -> None:
    assert list(unbounded(schema, {"A": {"type": "string"}}, "x")) == found


# --- faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_body_is_a_handful_of_faults(name: str) -> None:
    with pytest.raises(ValidationError) as caught:
        JobRequest.model_validate({**ORDER, **HOSTILE[name][0]})
    assert caught.value.error_count() <= 16


@pytest.mark.parametrize("name", HOSTILE)
def test_a_large_body_is_refused_as_a_small_one_would_be(lab: Lab, name: str) -> None:
    fields, code, param = HOSTILE[name]
    assert len(json.dumps(fields)) > bodies.LARGE
    error = refused(lab.client.post(JOBS, json={**ORDER, **fields}), 400, code, param)
    assert len(error["message"]) < 300


@pytest.mark.parametrize("size", [10, 200_000])
def test_what_is_no_json_is_refused_whatever_its_size(lab: Lab, size: int) -> None:
    reply = lab.client.post(JOBS, content=b"[" + b"1," * size, headers={"content-type": "application/json"})
    refused(reply, 400, "invalid_json", None)


@pytest.mark.parametrize("depth", [100, 900, 100_000])
def test_values_nested_deep_are_refused_in_our_shape(lab: Lab, depth: int) -> None:
    nested = "[" * depth + "]" * depth
    body = json.dumps({**ORDER, "model": 0}).replace("0", nested, 1)
    reply = lab.client.post(JOBS, content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert len(reply.json()["error"]["message"]) < 300


def test_no_more_faults_are_looked_at_than_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[int]()
    first = errors.find_first_fault
    monkeypatch.setattr(errors, "find_first_fault", lambda found, body: seen.append(len(found)) or first(found, body))
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(list[str]).validate_python(NUMBERS)
    errors.malformed(caught.value.errors(), NUMBERS)
    assert seen == [100]


def test_a_large_order_that_is_right_is_taken(lab: Lab) -> None:
    # An earlier job's answer, which an order may repeat.
    kind = {"group": "other", "out_features": 1, "in_features": 8, "count": 1, "reason": "it is smaller than the rank"}
    told = {"left_out": [{"name": f"gate_{number}", **kind} for number in range(500)]}
    assert len(json.dumps(told)) > bodies.LARGE
    assert lab.order(lora=told)["status"] == "validating_files"


# --- the loop ------------------------------------------------------------------------------------


def test_a_large_body_is_taken_apart_in_a_thread_while_the_loop_answers(
    lab: Lab, app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread waits here for an answer that only the loop can give."""
    answered, read = threading.Event(), bodies._model_of

    def held(raw: bytes, model: TypeAdapter[Any]) -> Any:
        assert answered.wait(30)
        return read(raw, model)

    monkeypatch.setattr(bodies, "_model_of", held)

    async def both() -> tuple[int, int]:
        order = asyncio.create_task(ask(app, "POST", JOBS, json.dumps({**ORDER, **KEYS}).encode(), lab.secret))
        await asyncio.sleep(0)
        health = await ask(app, "GET", "/healthz", b"", lab.secret)
        answered.set()
        return health, await order

    assert asyncio.run(both()) == (200, 400)


async def ask(app: Any, method: str, path: str, body: bytes, secret: str) -> int:
    """The status of an answer, over plain ASGI."""
    statuses = list[int]()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    headers = [(b"content-type", b"application/json"), (b"authorization", f"Bearer {secret}".encode())]
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
             "raw_path": path.encode(), "query_string": b"", "headers": headers, "scheme": "http",
             "server": ("test", 80), "client": ("127.0.0.1", 1), "root_path": ""}  # fmt: skip
    await app(scope, receive, send)
    return statuses[0]
