"""Lists of jobs: pages, and the metadata filter with all its corners."""

from urllib.parse import quote_plus

import pytest

from tests.api.conftest import JOBS, Lab, refused

pytestmark = pytest.mark.one_database
LABELS: dict[str, dict[str, str] | None] = {
    "plain": {"team": "a b/c"},
    "two": {"team": "a b/c", "env": "dev"},
    "empty": {"team": ""},
    "odd": {'k"]% key': "v", "a.b[0]": "ä"},
    "none": None,
}


def listed(lab: Lab, made: dict[str, str], query: str) -> set[str]:
    reply = lab.client.get(f"{JOBS}?{query}")
    assert reply.status_code == 200, reply.text
    names = {job_id: name for name, job_id in made.items()}
    return {names[job["id"]] for job in reply.json()["data"]}


def pair(key: str, value: str) -> str:
    return f"{quote_plus(f'metadata[{key}]')}={quote_plus(value)}"


@pytest.fixture
def made(lab: Lab) -> dict[str, str]:
    file = lab.upload()["id"]
    return {name: lab.order(file, metadata=labels)["id"] for name, labels in LABELS.items()}


def test_metadata_pairs_match_exactly_and_together(lab: Lab, made: dict[str, str]) -> None:
    assert listed(lab, made, pair("team", "a b/c")) == {"plain", "two"}
    assert listed(lab, made, pair("team", "a b/c") + "&" + pair("env", "dev")) == {"two"}
    assert listed(lab, made, pair("team", "a")) == set()
    assert listed(lab, made, pair('k"]% key', "v")) == {"odd"}
    assert listed(lab, made, pair("a.b[0]", "ä")) == {"odd"}


def test_pages_of_a_search_follow_each_other(lab: Lab) -> None:
    file = lab.upload()["id"]
    both = [lab.order(file, metadata={"team": "a", "env": "dev", "run": str(n)})["id"] for n in range(5)]
    lab.order(file, metadata={"team": "a"})
    for asked in (pair("env", "dev"), f"{pair('team', 'a')}&{pair('env', 'dev')}"):
        first = lab.client.get(f"{JOBS}?limit=3&{asked}").json()
        second = lab.client.get(f"{JOBS}?limit=3&after={first['last_id']}&{asked}").json()
        assert [job["id"] for job in first["data"] + second["data"]] == both[::-1]
        assert (first["has_more"], second["has_more"]) == (True, False)


def test_a_search_finds_nothing_of_other_projects(stranger: Lab, lab: Lab, made: dict[str, str]) -> None:
    assert listed(lab, made, pair("team", "a b/c"))
    assert stranger.client.get(f"{JOBS}?{pair('team', 'a b/c')}").json()["data"] == []


def test_metadata_may_be_empty_null_or_not_asked_for(lab: Lab, made: dict[str, str]) -> None:
    assert listed(lab, made, pair("team", "")) == {"empty"}
    assert listed(lab, made, "metadata=null") == {"none"}
    assert listed(lab, made, "metadata=") == set(LABELS)
    assert listed(lab, made, "") == set(LABELS)


def test_no_more_pairs_are_asked_for_than_a_job_can_have(lab: Lab) -> None:
    many = [pair(f"key{number}", "x") for number in range(1000)]
    assert lab.client.get(f"{JOBS}?{'&'.join(many[:16])}").json()["data"] == []
    for count in (17, 1000):
        refused(lab.client.get(f"{JOBS}?{'&'.join(many[:count])}"), 400, "invalid_value", "metadata")


def test_a_key_that_is_asked_for_twice_is_refused(lab: Lab) -> None:
    refused(lab.client.get(f"{JOBS}?{pair('a', '1')}&{pair('a', '2')}"), 400, "invalid_value", "metadata")


@pytest.mark.parametrize(
    "query", ["metadata=null&metadata%5Ba%5D=b", "metadata=other", "metadata%5Ba=b", "metadata.a=b"]
)
def test_metadata_filters_that_contradict_or_are_none_are_refused(lab: Lab, query: str) -> None:
    refused(lab.client.get(f"{JOBS}?{query}"), 400, "invalid_value", "metadata")


def test_job_pages_follow_each_other(lab: Lab) -> None:
    file = lab.upload()["id"]
    ids = [lab.order(file)["id"] for _ in range(5)]
    first = lab.client.get(f"{JOBS}?limit=3").json()
    lab.order(file)
    second = lab.client.get(f"{JOBS}?limit=3&after={first['last_id']}").json()
    assert [job["id"] for job in first["data"] + second["data"]] == ids[::-1]
    assert (first["has_more"], second["has_more"]) == (True, False)
