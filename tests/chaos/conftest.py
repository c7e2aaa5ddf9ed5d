"""A fleet that nobody attacks but the test: one job at a time, with leases of three seconds."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import httpx2
import pytest

from tests.chaos.clients import ROWS, stub_orders
from tests.chaos.fleet import Fleet
from tests.chaos.ledger import Ledger
from tests.chaos.storage import Folder


class Town:
    """The service, a client of it, and what the trainers wrote down."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.ledger = fleet, Ledger(fleet.database)
        headers = {"authorization": f"Bearer {fleet.set_up()}"}
        self.client = httpx2.Client(base_url=f"{fleet.url}/v1", headers=headers, timeout=20)
        self.until(fleet.is_up, seconds=90)
        upload = {"files": {"file": ("train.jsonl", ROWS)}, "data": {"purpose": "fine-tune"}}
        self.file = self.client.post("/files", **upload).json()["id"]  # type: ignore[arg-type]

    def order(self, *, steps: int, seed: int) -> str:
        """A job of `steps` steps of a twentieth of a second; its id."""
        body = next(stub_orders(seed=seed, steps=(steps, steps)))
        reply = self.client.post("/fine_tuning/jobs", json={**body, "training_file": self.file})
        assert reply.status_code == 200, reply.text
        return str(reply.json()["id"])

    def status(self, job_id: str) -> str:
        return str(self.client.get(f"/fine_tuning/jobs/{job_id}").json()["status"])

    def lines(self, job_id: str) -> list[tuple[float, int]]:
        """When something was trained, and by which attempt."""
        path = self.fleet.steps / job_id
        found = (line.split() for line in path.read_text().splitlines()) if path.exists() else iter(())
        return [(float(at), int(token)) for at, token, _, _ in found]

    def until(self, condition: Callable[[], Any], *, seconds: float) -> float:
        """Keep the fleet alive until it is so; how long that took."""
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < seconds, f"not within {seconds} s"
            self.fleet.tend()
            time.sleep(0.05)
        return time.monotonic() - began


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    place = tmp_path_factory.mktemp("town")
    fleet = Fleet(place, Folder(place / "storage"), mutant=None)
    try:
        town = Town(fleet)
        with closing(town.client):  # which is open since its first request
            yield town
    finally:
        fleet.close()
