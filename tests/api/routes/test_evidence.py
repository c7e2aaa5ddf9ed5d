"""What `make evidence` asks of the service: experiments are created once, and what has ended is read once."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from api.core.db.database import session_scope
from api.core.db.tables import Job
from benchmarks.evidence import measure, store
from benchmarks.evidence.measure import OtherRequest, Where
from benchmarks.evidence.plan import Study
from benchmarks.evidence.store import Measured
from tests import stub_worker
from tests.api.conftest import JSONL, Lab
from tests.api.routes.compared import EXPERIMENTS
from tests.things import ON_ONE_DATABASE
from worker import reconciler

pytestmark = ON_ONE_DATABASE
STUDY = Study(
    key="small", title="two initializations", inits=[{"method": "kaiming"}, {"method": "pissa"}],
    rates=(3e-4,), seeds=(1, 2), extend=False,
)  # fmt: skip
WHERE = Where("two cores", 19)


class Connection:
    """The service of a test. `work`: called when the measurement would wait."""

    def __init__(self, lab: Lab, work: Any = None) -> None:
        self.lab, self.work, self.waits = lab, work, 0

    def connect(self) -> OpenAI:
        return OpenAI(base_url="http://testserver/v1", api_key=self.lab.secret, http_client=self.lab.client)

    def keep_up(self) -> None:
        self.waits += 1
        assert self.waits < 50, "it never ends"
        self.work()


@pytest.fixture
def rows(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    for path, content in zip(paths, (JSONL, JSONL * 2), strict=True):
        path.write_bytes(content)
    return paths


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LOOK_SECONDS", 0.0)


def run_one() -> None:
    """What a worker does between two looks: the next job."""
    stub_worker.tidy()
    taken = stub_worker.claim()
    if taken is not None:
        stub_worker.train(*taken, valid=loss)
    while reconciler.advance_experiments():
        pass


def loss(job: Job, step: int) -> float:
    return 2.0 - 0.1 * step + 0.01 * job.seed


def run(lab: Lab, rows: tuple[Path, Path], folder: Path, *, work: Any = run_one) -> Measured:
    said = list[str]()
    measure.measure(Connection(lab, work), STUDY, rows, folder, report=said.append, where=WHERE)
    found = store.load(folder, "small")
    assert found is not None
    return found


def list_experiments(lab: Lab) -> list[dict[str, Any]]:
    return lab.client.get(EXPERIMENTS).json()["data"]


def test_every_cell_is_measured_with_its_curve_and_its_costs(lab: Lab, rows: tuple[Path, Path], tmp_path: Path) -> None:
    found = run(lab, rows, tmp_path / "results")
    assert (found.status, found.total, len(found.cells), found.nice) == ("succeeded", 4, 4, 19)
    assert {(cell["init"], cell["rate"], cell["seed"]) for cell in found.cells} == {
        (init, 3e-4, seed) for init in (0, 1) for seed in (1, 2)
    }
    cell = next(cell for cell in found.cells if (cell["init"], cell["rate"], cell["seed"]) == (1, 3e-4, 2))
    assert cell["steps"] == [0, 1, 2, 3]
    assert cell["losses"] == pytest.approx([2.02, 1.92, 1.82, 1.72])
    assert cell["init_seconds"] == 0.1
    assert set(cell["stage_seconds"]) >= {"loading", "training"}
    assert cell["adapter_bytes"] > 0 and cell["export_rank"] > 0 and cell["trainable_parameters"] > 0


def test_jobs_run_one_at_a_time_seed_by_seed(lab: Lab, rows: tuple[Path, Path], tmp_path: Path) -> None:
    found = run(lab, rows, tmp_path / "results")
    assert [cell["seed"] for cell in found.cells] == [1, 1, 2, 2]
    with session_scope() as session:
        assert not any(job.wants_group for job in session.query(Job))


class Stopped(Exception):
    """Somebody stops the measurement."""


def test_a_stopped_measurement_goes_on_with_what_is_left(lab: Lab, rows: tuple[Path, Path], tmp_path: Path) -> None:
    folder, done = tmp_path / "results", []

    def work() -> None:
        if len(done) == 2:
            raise Stopped
        done.append(run_one())

    with pytest.raises(Stopped):
        run(lab, rows, folder, work=work)
    before = store.load(folder, "small")
    assert before is not None and 0 < len(before.cells) < 4
    after = run(lab, rows, folder)
    assert after.cells[: len(before.cells)] == before.cells
    assert len(after.job_ids) == len(after.cells) == 4
    assert len(list_experiments(lab)) == 1
    assert len(lab.client.get("/v1/files?purpose=fine-tune").json()["data"]) == 2


def test_a_lost_file_of_results_is_written_again_without_measuring(
    lab: Lab, rows: tuple[Path, Path], tmp_path: Path
) -> None:
    first = run(lab, rows, tmp_path / "results")
    again = run(lab, rows, tmp_path / "other", work=None)
    assert sorted(map(json.dumps, again.cells)) == sorted(map(json.dumps, first.cells))


def test_other_rows_are_another_experiment_whose_cells_replace_the_first(
    lab: Lab, rows: tuple[Path, Path], tmp_path: Path
) -> None:
    first = run(lab, rows, tmp_path / "results")
    rows[1].write_bytes(JSONL * 3)
    second = run(lab, rows, tmp_path / "results")
    assert len(list_experiments(lab)) == 2
    assert second.digest != first.digest
    assert not second.job_ids & first.job_ids


def test_what_another_service_measured_is_replaced(lab: Lab, rows: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "results"
    first = run(lab, rows, folder)
    store.save(replace(first, experiment="exp_elsewhere", cells=first.cells[:2]), folder)
    again = run(lab, rows, folder)
    assert again.experiment == first.experiment
    assert len(again.cells) == 4


def test_an_unfinished_experiment_with_another_request_is_refused(
    lab: Lab, rows: tuple[Path, Path], tmp_path: Path
) -> None:
    client = Connection(lab).connect()
    shown = measure.find_or_create(client, STUDY, rows, "an earlier digest")
    with pytest.raises(OtherRequest, match=f"{shown['id']} .* has another request and has not ended"):
        run(lab, rows, tmp_path / "results")


def test_a_failed_job_is_a_cell_too(lab: Lab, rows: tuple[Path, Path], tmp_path: Path) -> None:
    def fail_pissa() -> None:
        stub_worker.tidy()
        taken = stub_worker.claim()
        if taken is not None and taken[0].recipe["lora"]["init"]["method"] == "pissa":
            stub_worker.fail(taken[1], "non_finite_loss", "The loss is not finite.")
        elif taken is not None:
            stub_worker.train(*taken, valid=loss)
        while reconciler.advance_experiments():
            pass

    found = run(lab, rows, tmp_path / "results", work=fail_pissa)
    failed = [cell for cell in found.cells if cell["init"] == 1]
    assert {(cell["status"], cell["error"], len(cell["losses"])) for cell in failed} == {
        ("failed", "non_finite_loss", 0)
    }
    assert len(failed) == 2


def test_a_service_that_does_not_answer_is_asked_again(lab: Lab, rows: tuple[Path, Path], tmp_path: Path) -> None:
    connection, said = Connection(lab, run_one), list[str]()
    connect, calls = connection.connect, []

    def fail_first() -> OpenAI:
        calls.append(1)
        if len(calls) == 1:
            raise FileNotFoundError("service.json")
        return connect()

    connection.connect = fail_first
    measure.measure(connection, STUDY, rows, tmp_path / "results", report=said.append, where=WHERE)
    assert said[0] == "the service does not answer (FileNotFoundError); asking again"
    assert len(said) == 5
