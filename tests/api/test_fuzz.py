"""Whatever a client sends, in the shape of the OpenAPI document or out of it: no server error, no undocumented answer.

Seeded and bounded: the same requests in every run, some hundreds per database. Half of the path
parameters name things that exist, so that requests get past the first 404.
"""

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from sqlalchemy.orm import Session

from tests.api.conftest import Lab
from tests.api.test_tenancy import PUBLIC, things_of
from tests.things import ON_ONE_DATABASE

EXAMPLES = 8  # of each operation, in each mode
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
LIMITS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def operations(app: Any) -> Iterator[Any]:
    for found in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations():
        yield found.ok()


def send_many(
    operation: Any, mode: GenerationMode, send: Callable[[Case, bool], None], *, examples: int = EXAMPLES
) -> None:
    @settings(LIMITS, max_examples=examples)
    @given(operation.as_strategy(generation_mode=mode), st.booleans())
    def each(case: Case, known: bool) -> None:
        send(case, known)

    each()


def ask(case: Case, authorization: str) -> Any:
    """Send a case with this key, whichever was made up for it."""
    made_up = {name: value for name, value in (case.headers or {}).items() if name.lower() != "authorization"}
    case.headers = {**made_up, "authorization": authorization}
    return case.call()


@pytest.mark.parametrize(  # PostgreSQL is the stricter of the two about what it is given
    "database_url", ["postgresql", pytest.param("sqlite", marks=pytest.mark.slow)], indirect=True
)
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_no_request_with_a_key_makes_a_server_error_or_an_undocumented_answer(
    app: Any, admin: Lab, lab: Lab, session: Session, mode: GenerationMode
) -> None:
    ids = {name: values[0] for name, values in things_of(admin, session, suffix="own").ids.items()} | {"method": "eva"}
    secrets = cycle((admin.secret, lab.secret, admin.secret))
    counts: dict[int, int] = {}

    def send(case: Case, known: bool) -> None:
        if known:
            case.path_parameters = {name: ids[name] for name in case.path_parameters}
        reply = ask(case, f"Bearer {next(secrets)}")
        case.validate_response(reply, checks=CHECKS)
        counts[reply.status_code] = counts.get(reply.status_code, 0) + 1

    for operation in operations(app):
        send_many(operation, mode, send)
    assert all(counts[status] > EXAMPLES for status in (200, 400, 403, 404)), counts


@ON_ONE_DATABASE
def test_no_request_without_a_key_gets_anything_but_a_401(app: Any, admin: Lab) -> None:
    def send(case: Case, known: bool) -> None:
        reply = ask(case, "Bearer sk-lorainit-0-1" if known else "")
        case.validate_response(reply, checks=CHECKS)
        # The framework reads a JSON body first: one that is none is refused before anybody asks for the key.
        unread = reply.status_code == 400 and reply.json()["error"]["code"] == "invalid_json"
        private = case.operation.path not in PUBLIC
        assert unread or (reply.status_code == 401) == private, case.as_curl_command()

    for operation in operations(app):
        for mode in GenerationMode:
            send_many(operation, mode, send, examples=3)
