"""Holding a job: renewed while it is ours, let go when it is not or when nobody can tell."""

import time
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from api.core.db.database import session_scope
from api.core.db.tables import Job
from api.core.jobs import jobs
from api.core.jobs.jobs import Lease
from tests.promises import within
from tests.things import a_project, a_running_job
from worker.job.lease import LeaseKeeper

pytestmark = pytest.mark.usefixtures("service")


def running() -> tuple[Job, Lease]:
    with session_scope() as session:
        job, lease = a_running_job(session, a_project(session))
        session.commit()
    return job, lease


def keeper(lease: Lease, folder: Path, *, seconds: float = 5) -> LeaseKeeper:
    return LeaseKeeper(lease, folder / "lease", seconds=seconds, beat=0.05)


def test_the_lease_and_its_file_are_renewed(tmp_path: Path) -> None:
    job, lease = running()
    with keeper(lease, tmp_path, seconds=600) as held:
        first = float((tmp_path / "lease").read_text())
        deadline = time.monotonic() + 300
        while float((tmp_path / "lease").read_text()) == first:
            assert time.monotonic() < deadline, "it is not renewed"
            time.sleep(0.02)
        assert float((tmp_path / "lease").read_text()) > first > time.monotonic()
        assert not held.lost.is_set()
    with session_scope() as session:
        renewed = session.get_one(Job, job.id).lease_until
    assert renewed is not None
    assert job.lease_until is not None
    assert renewed != job.lease_until


def test_a_cancelled_job_is_let_go_within_a_beat(tmp_path: Path) -> None:
    job, lease = running()
    with keeper(lease, tmp_path) as held:
        with session_scope() as session:
            jobs.cancel(session, session.get_one(Job, job.id))
            session.commit()
        assert held.lost.wait(within(1))
        assert not (tmp_path / "lease").exists()


def test_a_closed_lease_is_renewed_no_more_and_runs_out(tmp_path: Path) -> None:
    _, lease = running()
    with keeper(lease, tmp_path) as held:
        held.close()
        last = (tmp_path / "lease").read_text()
        time.sleep(0.2)
        assert (tmp_path / "lease").read_text() == last
        assert not held.lost.is_set()


def test_a_job_that_is_let_go_is_dropped_at_once(tmp_path: Path) -> None:
    _, lease = running()
    with keeper(lease, tmp_path) as held:
        held.let_go()
        time.sleep(0.2)
        assert held.lost.is_set()
        assert not (tmp_path / "lease").exists()


def test_without_a_database_the_job_is_let_go_before_the_lease_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(session: Session, lease: Lease, *, lease_seconds: float) -> bool:
        raise OperationalError("UPDATE jobs", {}, Exception("connection refused"))

    _, lease = running()
    monkeypatch.setattr(jobs, "renew_lease", unreachable)
    started = time.monotonic()
    with keeper(lease, tmp_path, seconds=5.0) as held:
        assert held.lost.wait(60)
        assert 3.5 < time.monotonic() - started < 5.0
        assert not (tmp_path / "lease").exists()
