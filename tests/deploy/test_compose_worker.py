"""The worker-only compose file is the worker of docker-compose.yml, with addresses that the operator names."""

import re
from typing import Any

import pytest
import yaml

from api.core.settings import Settings
from tests.deploy.test_compose import COMPOSE, ROOT, SERVICES

TEXT = (ROOT / "docker-compose.worker.yml").read_text()
ALONE: dict[str, Any] = yaml.safe_load(TEXT)
WORKER: dict[str, Any] = ALONE["services"]["worker"]
EXAMPLE = (ROOT / ".env.worker.example").read_text()
PAGE = (ROOT / "docs" / "two-hosts.md").read_text()
# What the two files say each in their own way: addresses, what it waits for, and the host's name.
OWN = {"environment", "depends_on", "hostname"}


def test_there_is_nothing_but_the_worker() -> None:
    assert list(ALONE["services"]) == ["worker"]


def test_the_worker_is_that_of_the_whole_service() -> None:
    one, other = ({key: value for key, value in of.items() if key not in OWN} for of in (WORKER, SERVICES["worker"]))
    assert one == other


def test_it_is_told_all_that_the_worker_of_the_whole_service_is() -> None:
    of_the_api = {"LORAINIT_REQUESTS_PER_MINUTE"}
    assert set(SERVICES["worker"]["environment"]) - of_the_api <= set(WORKER["environment"])
    of_both = ("LORAINIT_WORKER_SLOTS", "LORAINIT_WORKER_DEVICE", "LORAINIT_WORKER_QUEUES", "HF_HOME", "HF_TOKEN")
    for name in of_both:
        assert WORKER["environment"][name] == SERVICES["worker"]["environment"][name]


def test_every_setting_named_exists() -> None:
    named = re.findall(r"\bLORAINIT_[A-Z0-9_]+", TEXT + EXAMPLE)
    assert set(named) <= {f"LORAINIT_{name.upper()}" for name in Settings.model_fields}


def test_compose_stops_where_an_address_or_a_secret_is_missing() -> None:
    variables = dict(re.findall(r"\$\{(\w+)([^}]*)\}", TEXT))
    assert {name for name, rest in variables.items() if not rest.startswith((":?", "?"))} == {"S3_REGION", "HF_TOKEN"}
    assert {name for name, rest in variables.items() if rest.startswith("?")} == {"S3_ENDPOINT"}  # empty is AWS


def test_every_variable_is_explained_and_has_no_value() -> None:
    used = set(re.findall(r"\$\{(\w+)", TEXT))
    assert used == set(re.findall(r"^#? ?(\w+)=", EXAMPLE, re.MULTILINE))
    assert all(line.endswith("=") for line in EXAMPLE.splitlines() if line and not line.startswith("#"))


def test_volumes_are_declared() -> None:
    assert {volume.partition(":")[0] for volume in WORKER["volumes"]} == set(ALONE["volumes"])


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    """The page's file for the first host."""
    (text,) = re.findall(r"```yaml\n# docker-compose\.override\.yml\n(.*?)```", PAGE, re.DOTALL)
    services: dict[str, Any] = yaml.safe_load(text)["services"]
    return services


def test_the_page_publishes_what_a_worker_needs_to_reach(published: dict[str, Any]) -> None:
    addresses = {
        name: COMPOSE["x-service"]["environment"][f"LORAINIT_{name}"] for name in ("DATABASE_URL", "BROKER_URL")
    }
    addresses["STORAGE"] = COMPOSE["x-service"]["environment"]["LORAINIT_S3_ENDPOINT"]
    needed = {re.search(r"(?:@|//)(\w+):(\d+)", address).groups() for address in addresses.values()}  # type: ignore[union-attr]
    assert {(name, service["ports"][0].rsplit(":", 1)[1]) for name, service in published.items()} == needed


def test_the_page_publishes_nothing_to_everybody(published: dict[str, Any]) -> None:
    for service in published.values():
        assert [re.match(r"\$\{PRIVATE_ADDRESS:\?[^}]*\}:\d+:\d+$", port) is not None for port in service["ports"]] == [
            True
        ]
