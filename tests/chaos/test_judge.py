"""The judge of a chaos run notices every kind of broken promise.

One job went well, as database, storage, its user and its trainer have it. Then one thing at a time is wrong with it.
"""

import hashlib
import io
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, delete, update
from sqlalchemy.orm import Session

from api.core.db import database, migrate
from api.core.db.tables import Adapter, Event, File, Job, Metric, Project
from api.core.jobs import jobs, metrics
from api.core.jobs.jobs import Failure, Lease
from tests.chaos.clients import Book, Order
from tests.chaos.judge import BAD, CANCEL_SECONDS, Judge, Verdict
from tests.chaos.ledger import Ledger
from tests.chaos.storage import Folder
from tests.chaos.trainer import after, begin, loss
from tests.things import a_file, a_project, a_running_job

MODEL, SEED, STEPS = "stub", 7, 4


class Case:
    """A job that went well, and all that a judge hears of it."""

    def __init__(self, session: Session, folder: Path, url: str) -> None:
        self.session, self.ledger = session, Ledger(url)
        self.ledger.watch()
        self.book, self.store, self.steps = Book(), Folder(folder / "storage"), folder / "steps"
        self.steps.mkdir()
        self.project: Project = a_project(session)
        self.job, self.lease = self.start(SEED)
        self._train()

    def start(self, seed: int) -> tuple[Job, Lease]:
        """A job that its user ordered, and that a worker runs."""
        recipe = {"lora": {"init": {"method": "kaiming"}}, "training": {"max_steps": STEPS}}
        job, lease = a_running_job(self.session, self.project, model=MODEL, seed=seed, recipe=recipe)
        body = {"model": MODEL, "seed": seed}
        self.book.orders.append(Order(key=str(seed), body=body, job_id=job.id, status="running"))
        self.session.commit()
        return job, lease

    def _train(self) -> None:
        states = [begin(SEED)]
        for step in range(1, STEPS + 1):
            states.append(after(states[-1], step))
        at = database.now(self.session)
        numbers = [(step, {"train_loss": loss(state)}) for step, state in enumerate(states) if step]
        metrics.save_steps(self.session, self.job.id, self.lease.token, numbers, at=at)
        self.log([(100.0 + step, self.lease.token, step) for step in range(STEPS + 1)])
        self._succeed(_tar(states[-1]))

    def _succeed(self, content: bytes) -> None:
        self.key = f"jobs/{self.job.id}/attempt-{self.lease.token}/adapter.tar"
        path = self.store.path / self.key
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        file = a_file(self.session, self.project, storage_key=self.key, sha256=sha256, bytes=len(content))
        adapter = Adapter(job_id=self.job.id, project_id=self.project.id, name="ft:stub", file_id=file.id, rank=4)
        ended: dict[str, Any] = {"trained_tokens": 1, "export_check": {}, "resources": {}, "progress": {}}
        assert jobs.succeed(self.session, self.lease, adapter=adapter, files=[], result_file_id=None, **ended)
        self.session.commit()

    def log(self, lines: list[tuple[float, int, int]]) -> None:
        """What the trainer writes down: when, which attempt, which step."""
        with (self.steps / self.job.id).open("a") as log:
            log.writelines(f"{at:.6f} {token} 1 {step}\n" for at, token, step in lines)

    def judged(self) -> Verdict:
        """The judge's verdict on what there is now."""
        self.session.commit()
        return Judge(self.ledger, book=self.book, store=self.store, steps=self.steps).decide()


def _tar(state: str) -> bytes:
    file, info = io.BytesIO(), tarfile.TarInfo("adapter_model.safetensors")
    info.size = len(state)
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(info, io.BytesIO(state.encode()))
    return file.getvalue()


@pytest.fixture(scope="module")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database without rows, to be copied."""
    path = tmp_path_factory.mktemp("judge") / "empty.db"
    engine = database.make_engine(f"sqlite:///{path}")
    migrate.upgrade(engine)
    engine.dispose()
    return path


@pytest.fixture
def engine(migrated_file: Path, tmp_path: Path) -> Iterator[Engine]:
    shutil.copy(migrated_file, tmp_path / "chaos.db")
    made = database.make_engine(f"sqlite:///{tmp_path}/chaos.db")
    yield made
    made.dispose()


@pytest.fixture
def case(engine: Engine, tmp_path: Path) -> Iterator[Case]:
    with Session(engine, expire_on_commit=False) as session:
        yield Case(session, tmp_path, f"sqlite:///{tmp_path}/chaos.db")


def test_a_job_that_went_well_is_no_broken_promise(case: Case) -> None:
    verdict = case.judged()
    assert verdict.is_clean, verdict.complaints
    assert (verdict.counts["submitted"], verdict.counts["finished"]) == (1, 1)


# --- what can be wrong ---------------------------------------------------------------------------


def _lose(case: Case) -> None:
    case.book.orders.append(Order(key="another", body={"model": MODEL, "seed": 8}, job_id="ftjob-gone"))


def _order_twice(case: Case) -> None:
    case.book.orders.clear()  # nobody ordered what there is


def _leave_running(case: Case) -> None:
    case.start(seed=8)


def _fail(case: Case) -> None:
    _, lease = case.start(seed=8)
    assert jobs.fail(case.session, lease, Failure("internal_error", "No."))


def _overlap(case: Case) -> None:
    case.log([(100.0 + STEPS - 0.5, case.lease.token + 1, 0)])  # started before the last step of the one before it


def _write_late(case: Case) -> None:
    case.session.execute(update(Metric).where(Metric.step == 2).values(lease_token=0))


def _take_other_weights(case: Case) -> None:
    content = _tar(begin(SEED))
    (case.store.path / case.key).write_bytes(content)
    case.session.execute(update(File).values(sha256=hashlib.sha256(content).hexdigest()))


def _leave_out_a_step(case: Case) -> None:
    case.session.execute(delete(Metric).where(Metric.step == 2))


def _leave_out_the_end(case: Case) -> None:
    case.session.execute(delete(Event).where(Event.message == "The job has successfully completed"))


def _run_on_after_cancel(case: Case) -> None:
    case.book.orders[0].cancelled_at = 100.0 + STEPS - CANCEL_SECONDS - 1


def _answer_wrong(case: Case) -> None:
    case.book.wrong.append("GET /fine_tuning/jobs: 500")


WRONG: dict[str, Callable[[Case], None]] = {
    "lost": _lose,
    "ordered twice": _order_twice,
    "stuck": _leave_running,
    "failed": _fail,
    "overlapping": _overlap,
    "stale writes": _write_late,
    "wrong adapters": _take_other_weights,
    "wrong metrics": _leave_out_a_step,
    "wrong stories": _leave_out_the_end,
    "ran on after cancel": _run_on_after_cancel,
    "wrong answers": _answer_wrong,
}


@pytest.mark.parametrize("column", WRONG)
def test_what_is_wrong_is_noticed_in_its_column(case: Case, column: str) -> None:
    WRONG[column](case)
    verdict = case.judged()
    assert verdict.counts[column] == 1, verdict.complaints
    assert not verdict.is_clean


def test_every_column_has_its_test() -> None:
    assert {*WRONG, "orphan trainers"} == set(
        BAD
    )  # orphans are looked for while the run goes on: tests/chaos/orphans.py
