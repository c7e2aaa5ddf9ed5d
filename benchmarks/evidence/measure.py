"""Has the service run the experiments, one after the other, and keeps what each job showed as soon as it has ended.

Everything can be interrupted: experiments and jobs are in the service's state folder, what was read of them is in the
results' folder, and both are looked at before anything is asked for.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from openai import APIConnectionError, InternalServerError, OpenAI

from benchmarks.evidence import collect, store
from benchmarks.evidence.plan import LABEL, Study, compute_digest
from benchmarks.evidence.rows import compute_sha256
from benchmarks.evidence.store import Measured

LOOK_SECONDS = 10.0  # between two looks at a running experiment

Report = Callable[[str], None]


class Connection(Protocol):
    """A service that may be restarted while it is asked."""

    def connect(self) -> OpenAI:
        """A client of its present address."""

    def keep_up(self) -> None:
        """Restart it if it has ended."""


@dataclass(frozen=True)
class Where:
    """Where something is measured: the machine in words, and the niceness beside other programs."""

    machine: str
    nice: int


class OtherRequest(Exception):
    """An experiment of an earlier plan is still running; the message says which."""


def measure(
    service: Connection, study: Study, rows: tuple[Path, Path], results: Path, *, report: Report, where: Where
) -> None:
    """Run an experiment to its end, or what is left of it.

    Args:
        rows: the training and the validation file.
        results: the folder of what was measured.

    Raises:
        OtherRequest: an earlier plan's experiment is in the way.
    """
    digest = compute_digest(study.make_request(*(compute_sha256(path) for path in rows)))
    measured = store.load(results, study.key)
    if measured is None or measured.digest != digest:
        measured = Measured(study.key, digest, study.planned)
    measured.nice = max(measured.nice, where.nice)
    keeper = Keeper(study, measured, results, where.machine, report)
    while not _look(service, keeper, rows):
        service.keep_up()
        time.sleep(LOOK_SECONDS)


def _look(service: Connection, keeper: "Keeper", rows: tuple[Path, Path]) -> bool:
    """Bring the results up to date; True if the experiment has ended. A service that does not answer is asked later."""
    try:
        client = service.connect()
        shown = find_or_create(client, keeper.study, rows, keeper.measured.digest)
        return keeper.update(client, shown)
    except (APIConnectionError, InternalServerError, OSError) as error:
        keeper.report(f"the service does not answer ({type(error).__name__}); asking again")
        return False


def find_or_create(client: OpenAI, study: Study, rows: tuple[Path, Path], digest: str) -> dict[str, Any]:
    """The experiment with this very request; it is created if there is none.

    Raises:
        OtherRequest: an experiment of this name and another request has not ended.
    """
    name = study.make_request("", "")["name"]
    mine = [one for one in _list_experiments(client) if one["name"] == name]
    for one in mine:
        if (one["metadata"] or {}).get(LABEL) == digest and one["status"] != "cancelled":
            found: Any = client.get(f"/experiments/{one['id']}", cast_to=object)
            return dict(found)
    for one in mine:
        if one["finished_at"] is None:
            raise OtherRequest(f"{one['id']} ({name}) has another request and has not ended: cancel it first.")
    files = [find_or_upload(client, path) for path in rows]
    body = {**study.make_request(*files), "metadata": {LABEL: digest}}
    made: Any = client.post("/experiments", body=body, cast_to=object)
    return dict(made)


def _list_experiments(client: OpenAI) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while True:
        after = f"&after={found[-1]['id']}" if found else ""
        page: Any = client.get(f"/experiments?limit=100{after}", cast_to=object)
        found += page["data"]
        if not page["has_more"]:
            return found


def find_or_upload(client: OpenAI, path: Path) -> str:
    """The id of a file with these bytes; it is uploaded if there is none."""
    digest = compute_sha256(path)
    for file in client.files.list(purpose="fine-tune"):
        if (file.model_extra or {}).get("sha256") == digest:
            return file.id
    return client.files.create(file=path, purpose="fine-tune").id


@dataclass
class Keeper:
    """Keeps what the jobs of one experiment showed, in the folder `results`."""

    study: Study
    measured: Measured
    results: Path
    machine: str
    report: Report

    def update(self, client: OpenAI, shown: dict[str, Any]) -> bool:
        """Read the jobs that have ended since the last look; True if the experiment has ended and all were read."""
        measured, counts = self.measured, shown["job_counts"]
        self._require_same_service(shown["id"])
        measured.total, measured.status, before = counts["total"], shown["status"], len(measured.cells)
        if sum(counts[status] for status in collect.ENDED) > before:
            self._read_ended(client, shown["id"])
        done = shown["finished_at"] is not None and len(measured.cells) == counts["total"]
        if len(measured.cells) != before or done:
            store.save(measured, self.results)
        return done

    def _require_same_service(self, experiment_id: str) -> None:
        """Forget what another service measured, because this one measures all of it again."""
        if self.measured.cells and self.measured.experiment != experiment_id:
            self.report(f"{self.study.key}: {len(self.measured.cells)} cells of another service are replaced")
            self.measured.cells, self.measured.facts = [], []
        self.measured.experiment = experiment_id

    def _read_ended(self, client: OpenAI, experiment_id: str) -> None:
        known = self.measured.job_ids
        jobs = [job for job in collect.list_jobs(client, experiment_id) if job.status in collect.ENDED]
        for job in sorted(jobs, key=lambda job: job.finished_at or 0):
            if job.id not in known:
                cell = collect.read_cell(client, job, self.study.inits, machine=self.machine)
                self.measured.add(cell)
                self.report(self._describe(cell))

    def _describe(self, cell: dict[str, Any]) -> str:
        place = f"{self.study.key} {len(self.measured.cells)}/{self.measured.total}"
        what = f"{self.study.names[cell['init']]} at {cell['rate']:g}, seed {cell['seed']}"
        if cell["status"] != "succeeded":
            return f"{place}: {what} {cell['status']} ({cell['error']})"
        seconds = sum(value or 0.0 for value in cell["stage_seconds"].values())
        return f"{place}: {what}: {cell['losses'][0]:.4f} -> {cell['losses'][-1]:.4f} in {seconds:.0f} s"
