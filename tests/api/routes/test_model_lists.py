"""The complete list of models, in bounded memory, and pages of it."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from openai import OpenAI
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from api.cli import client as remote
from api.cli import tables
from api.core.db import database
from api.core.models import registry
from tests.api.conftest import Lab, refused
from tests.things import MODEL, a_project, an_adapter

pytestmark = pytest.mark.one_database
NEWEST = datetime(2026, 11, 28, tzinfo=UTC)


@pytest.fixture
def trained(lab: Lab, session: Session) -> Callable[[int], list[str]]:
    """Makes adapters; their names, newest first. Pairs of them are of the same moment."""

    def train(count: int) -> list[str]:
        made = []
        for number in range(count):
            name = f"ft:{MODEL}:local:{'Even' if number % 2 == 0 else 'odd'}:{number:08}"
            made.append(an_adapter(session, lab.project, name, created_at=NEWEST - timedelta(seconds=number // 2)))
        session.commit()
        return [one.name for one in sorted(made, key=lambda one: (one.created_at, one.job_id), reverse=True)]

    return train


def ids(page: dict[str, Any]) -> list[str]:
    found = [model["id"] for model in page["data"]]
    assert (page["object"], page["first_id"], page["last_id"]) == ("list", found[0], found[-1])
    return found


def look(lab: Lab, **query: Any) -> dict[str, Any]:
    reply = lab.client.get("/v1/models", params=query)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


@pytest.mark.parametrize("count", [0, 1, 2, 4, 5])
def test_the_list_is_complete_however_many_batches_it_takes(
    lab: Lab, trained: Callable[[int], list[str]], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "BATCH", 2)
    names = trained(count)
    page = look(lab)
    assert ids(page) == [MODEL, *names]
    assert list(page) == ["object", "data", "first_id", "last_id", "has_more"] and page["has_more"] is False


def test_a_list_of_nothing_is_a_list(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.catalogue, "get_entries", dict)
    nothing = {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    assert look(lab) == look(lab, limit=1) == nothing


def test_a_page_says_of_a_model_what_the_list_and_the_model_say(lab: Lab, trained: Callable[[int], list[str]]) -> None:
    (name,) = trained(1)
    assert look(lab)["data"] == look(lab, limit=9)["data"]
    assert look(lab)["data"][1] == lab.client.get(f"/v1/models/{name}").json()


def test_no_session_is_open_while_a_batch_is_sent(service: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "BATCH", 2)
    with database.session_scope() as session:
        project = a_project(session)
        for number in range(3):
            an_adapter(session, project, f"ft:x:local::{number}")
        session.commit()
    batches = registry.iterate_batches(project.id)
    sizes = []
    for batch in batches:
        sizes.append(len(batch))
        assert database.get_reader().pool.checkedout() == 0  # type: ignore[attr-defined]
    assert sizes == [3, 1]  # the base comes with the first


def test_what_fails_before_the_first_batch_is_an_answer(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(*_: Any, **__: Any) -> None:
        raise OperationalError("SELECT 1", {}, Exception("connection refused"))

    monkeypatch.setattr(registry, "_select_adapters", down)
    refused(lab.client.get("/v1/models"), 503, "not_ready")


@pytest.mark.parametrize("size", [1, 2, 3])
def test_pages_follow_each_other_to_the_end(lab: Lab, trained: Callable[[int], list[str]], size: int) -> None:
    names, seen, after = trained(5), list[str](), None
    while True:
        page = look(lab, limit=size, **({} if after is None else {"after": after}))
        seen += ids(page)
        after = page["last_id"]
        if not page["has_more"]:
            break
        assert len(page["data"]) == size
    assert seen == [MODEL, *names]


def test_a_page_has_what_is_searched_for_in_any_case(lab: Lab, trained: Callable[[int], list[str]]) -> None:
    names = trained(4)
    even = [name for name in names if "Even" in name]
    assert ids(look(lab, search="eVEN")) == even
    assert ids(look(lab, search="even", after=even[0])) == even[1:]
    assert ids(look(lab, search=MODEL.upper(), limit=1)) == [MODEL]
    for nothing in ("%", "_", "nothing"):
        assert look(lab, search=nothing)["data"] == []


def test_a_page_goes_on_from_a_model_that_was_deleted_meanwhile(lab: Lab, trained: Callable[[int], list[str]]) -> None:
    names = trained(3)
    assert lab.client.delete(f"/v1/models/{names[0]}").status_code == 200
    assert ids(look(lab, after=names[0])) == names[1:]
    assert ids(look(lab)) == [MODEL, *names[1:]]


def test_a_page_after_no_model_of_this_project_is_refused(
    lab: Lab, stranger: Lab, trained: Callable[[int], list[str]]
) -> None:
    (name,) = trained(1)
    for after in (name, "nope"):
        refused(stranger.client.get("/v1/models", params={"after": after}), 400, "invalid_value", "after")


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x"])
def test_a_page_of_a_wrong_size_is_refused(lab: Lab, query: str) -> None:
    refused(lab.client.get(f"/v1/models?{query}"), 400, "invalid_value", "limit")


def test_empty_values_ask_for_the_complete_list(lab: Lab, trained: Callable[[int], list[str]]) -> None:
    names = trained(1)
    assert ids(json.loads(lab.client.get("/v1/models?limit=&after=&search=").text)) == [MODEL, *names]


@pytest.mark.parametrize(("limit", "asked"), [(1, 1), (3, 1), (4, 2), (7, 2), (50, 2)])
def test_the_command_line_fetches_no_more_pages_than_it_shows(
    lab: Lab, trained: Callable[[int], list[str]], limit: int, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PAGE", 3)
    names, pages = [MODEL, *trained(4)], list[str]()
    lab.client.event_hooks["request"].append(lambda request: pages.append(str(request.url)))
    client = OpenAI(base_url="http://testserver/v1", api_key=lab.secret, http_client=lab.client)
    found = list(remote.list_models(client, search="", limit=limit))
    assert [model.id for model in found] == names[:limit] and len(pages) == asked
    assert tables.make_model_row(found[0]) == (MODEL, "base", "", "")
    assert all(tables.make_model_row(model)[1:3] == ("adapter", MODEL) for model in found[1:])
    assert [model.id for model in remote.list_models(client, search="even", limit=limit)] == [
        n for n in names if "Even" in n
    ][:limit]
