"""One shape for everything that goes wrong, and a request id on every answer."""

import ast
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

import api
from api.core.errors import Refusal
from api.core.jobs import lookup
from api.errors import CODES, STATUS
from api.invalid import OWN_CODES
from tests.api.conftest import JOBS, Lab, refused

pytestmark = pytest.mark.one_database
SOURCES = sorted(Path(api.__file__).parent.rglob("*.py"))


def raised() -> list[tuple[str, str]]:
    """(class, code) of every refusal constructed with a literal code in the sources."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            codes = [word.value for word in node.keywords if word.arg == "code"]
            if codes and isinstance(codes[0], ast.Constant) and node.func.id in {kind.__name__ for kind in STATUS}:
                found.append((node.func.id, str(codes[0].value)))
    return found


def test_every_code_is_in_the_list_with_its_status() -> None:
    status = {kind.__name__: number for kind, number in STATUS.items()}
    assert len(raised()) > 30
    for kind, code in raised():
        assert status[kind] in CODES[code], (kind, code)
    assert all(400 in CODES[code] for code in OWN_CODES)


def test_every_refusal_has_a_status() -> None:
    def below(kind: type[Refusal]) -> set[type[Refusal]]:
        return {kind, *(deep for child in kind.__subclasses__() for deep in below(child))}

    assert below(Refusal) - {Refusal} == set(STATUS)


def test_nothing_raises_http_exceptions() -> None:
    for path in SOURCES:
        assert "raise HTTPException" not in path.read_text("utf-8"), path


def test_an_unknown_route_names_those_that_exist(client: TestClient) -> None:
    error = refused(client.get("/v1/nope"), 404, "unsupported_endpoint")
    assert "POST /v1/fine_tuning/jobs" in error["message"]
    for path in ("/v1/embeddings", "/v1/batches", "/v1/responses", "/v1/fine_tuning/alpha/graders/run", "/"):
        refused(client.post(path), 404, "unsupported_endpoint")


@pytest.mark.parametrize(
    ("verb", "path"), [("GET", "/models"), ("POST", "/fine_tuning/jobs"), ("POST", "/uploads"), ("GET", "/models/a/b")]
)
def test_an_address_without_v1_is_told_so(client: TestClient, verb: str, path: str) -> None:
    error = refused(client.request(verb, path), 404, "unsupported_endpoint")
    assert error["message"] == f"{path} does not exist and /v1{path} does: the base URL of this API ends in /v1."


@pytest.mark.parametrize("base", ["/v2", "/api/v1", "/v1/v1", "/some/where/v1"])
@pytest.mark.parametrize("path", ["/models", "/fine_tuning/jobs", "/fine_tuning/jobs/x/events"])
def test_an_address_of_another_version_or_with_more_before_it_is_told_so(
    client: TestClient, base: str, path: str
) -> None:
    error = refused(client.get(base + path), 404, "unsupported_endpoint")
    assert error["message"] == f"{base}{path} does not exist and /v1{path} does: the base URL of this API ends in /v1."


def test_an_id_with_a_slash_is_answered_in_a_sentence(client: TestClient) -> None:
    error = refused(client.post(f"{JOBS}/%5Bred%5Dx%5B%2Fred%5D/pause"), 404, "unsupported_endpoint")
    assert error["message"] == f"POST {JOBS}/[red]x[/red]/pause does not exist: ids contain no slash."


@pytest.mark.parametrize(
    ("verb", "path"),
    [
        ("POST", "/v1/uploads"),
        ("POST", f"{JOBS}/plan"),
        ("GET", f"{JOBS}/ftjob-x/metrics"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("GET", "/v1/webhook_endpoints"),
        ("GET", "/v1/organization/projects"),
    ],
)
def test_a_planned_route_says_so(client: TestClient, verb: str, path: str) -> None:
    assert "planned" in refused(client.request(verb, path), 400, "not_supported")["message"]


def test_a_wrong_verb_names_the_right_ones(client: TestClient) -> None:
    reply = client.put("/v1/files")
    refused(reply, 405, "method_not_allowed")
    assert reply.headers["allow"] == "GET, POST"


def test_a_bug_is_a_500_in_our_shape_with_a_request_id(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(lookup, "find_with_key", broken)
    reply = lab.client.get(f"{JOBS}/ftjob-x")
    error = refused(reply, 500, "internal_error")
    assert error["type"] == "server_error"
    assert reply.headers["x-request-id"] in error["message"]
    assert "secret detail" not in reply.text


def test_every_answer_carries_id_time_and_organization(client: TestClient) -> None:
    replies = [client.get("/v1/models"), client.get("/healthz"), client.get("/nope"), client.put("/v1/files")]
    ids = [reply.headers["x-request-id"] for reply in replies]
    assert len(set(ids)) == 4
    assert all(reply.headers["openai-organization"] == "org-local" for reply in replies)
    assert all(reply.headers["openai-processing-ms"].isdecimal() for reply in replies)


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=ten", "after=ftjob-x", "after=%00"])
def test_a_wrong_page_is_refused(client: TestClient, query: str) -> None:
    error = client.get(f"{JOBS}?{query}")
    assert error.status_code == 400
    assert error.json()["error"]["code"] == "invalid_value"


def test_empty_query_values_count_as_absent(client: TestClient) -> None:
    assert client.get(f"{JOBS}?limit=&after=").status_code == 200
    assert client.get("/v1/files?limit=&after=&order=&purpose=").status_code == 200


@pytest.mark.parametrize("path", ["/v1/files/%00", "/v1/models/%00", f"{JOBS}/%00", "/v1/files/..%2F..%2Fetc%2Fpasswd"])
def test_a_strange_id_is_never_a_server_error(client: TestClient, path: str) -> None:
    assert client.get(path).status_code in (400, 404)


def test_a_database_that_is_down_is_a_503(lab: Lab, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    from sqlalchemy.exc import OperationalError

    def down(*_: Any) -> None:
        raise OperationalError("SELECT 1", {}, Exception("connection refused"))

    monkeypatch.setattr(lookup, "find_with_key", down)
    reply = lab.client.get(f"{JOBS}/ftjob-x")
    refused(reply, 503, "not_ready")
    assert 1 <= int(reply.headers["retry-after"]) <= 10


@pytest.mark.parametrize("verb", ["GET", "DELETE"])
def test_a_line_break_in_a_model_name_is_a_404(client: TestClient, verb: str) -> None:
    refused(client.request(verb, "/v1/models/a%0Ab"), 404, "unsupported_endpoint")


def test_an_empty_rank_counts_as_absent(client: TestClient) -> None:
    assert client.get("/v1/lora/methods?r=&model=").json() == client.get("/v1/lora/methods").json()
    refused(client.get("/v1/lora/methods?r=0"), 400, "invalid_value", "r")
