"""Retention end to end: bytes leave storage, whenever the process dies in between."""

import io
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import select, update

from api.core.access import keys
from api.core.db.database import session_scope
from api.core.db.tables import Creation, File, Job, Project, StoragePeriod
from api.core.files.storage import ObjectStorage, get_storage
from api.core.jobs import jobs, metrics
from api.core.monitoring import counters
from api.core.settings import get_settings
from tests.things import a_file, a_project, a_running_job
from worker.maintenance import janitor

pytestmark = pytest.mark.usefixtures("service")

PAST = datetime.now(UTC) - timedelta(days=2)


def a_stored_file(**columns: object) -> tuple[Project, File]:
    with session_scope() as session:
        project = a_project(session)
        file = a_file(session, project, storage_key=f"files/{project.id}/x", **columns)
        get_storage().put(file.storage_key, io.BytesIO(b"rows"))
        session.commit()
        return project, file


def stored(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "storage").rglob("*") if path.is_file())


def age(folder: Path) -> None:
    """Every object becomes two days old, and the database has been there for three."""
    for path in (folder / "storage").rglob("*"):
        os.utime(path, (time.time() - 2 * 86400,) * 2)
    since, until = (datetime.now(UTC) - timedelta(days=days) for days in (3, 0))
    with session_scope() as session:
        session.add(StoragePeriod(id="watch-1", since=since, until=until, token="", next_token=""))
        session.commit()


def test_an_expired_file_loses_its_row_and_then_its_bytes(tmp_path: Path) -> None:
    _, file = a_stored_file(expires_at=PAST)
    assert janitor.expire_files() is True
    assert stored(tmp_path) == ["x"]
    assert janitor.clear() is True
    assert stored(tmp_path) == []
    assert janitor.clear() is False
    with session_scope() as session:
        row = session.get_one(File, file.id)
        assert row.deleted_at is not None
        assert row.cleared_at is not None
        assert [(c.name, c.value) for c in counters.read(session)] == [("objects_removed", 1)]


def test_bytes_left_by_a_crash_between_row_and_bytes_are_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_stored_file(deleted_at=PAST)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(get_storage()), "delete", crash)
        with pytest.raises(KeyboardInterrupt):
            janitor.clear()
    assert stored(tmp_path) == ["x"]
    janitor.clear()
    assert stored(tmp_path) == []


def test_a_row_whose_bytes_are_gone_already_is_noted_and_left(tmp_path: Path) -> None:
    _, file = a_stored_file(deleted_at=PAST)
    get_storage().delete(file.storage_key)
    assert janitor.clear() is True
    assert janitor.clear() is False


def test_the_object_of_a_probe_that_was_killed_goes_after_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ObjectStorage, "delete", lambda *_: None)
    get_storage().probe()
    monkeypatch.undo()
    (left,) = (tmp_path / "storage" / "probe").iterdir()
    janitor.sweep_orphans()
    assert left.exists()
    os.utime(left, (0, 0))
    janitor.sweep_orphans()
    assert not left.exists()


def test_an_orphan_goes_a_day_after_it_was_written(tmp_path: Path) -> None:
    project, _ = a_stored_file()
    get_storage().put(f"files/{project.id}/orphan", io.BytesIO(b"lost"))
    janitor.sweep_orphans()
    assert stored(tmp_path) == ["orphan", "x"]
    age(tmp_path)
    janitor.sweep_orphans()
    assert stored(tmp_path) == ["x"]


def test_what_somebody_else_keeps_in_the_bucket_stays(tmp_path: Path) -> None:
    for key in ("files/proj_other/file", "jobs/ftjob-other/adapter.tar", "photos/cat", "probe/theirs"):
        get_storage().put(key, io.BytesIO(b"theirs"))
    age(tmp_path)
    janitor.sweep_orphans()
    assert stored(tmp_path) == ["adapter.tar", "cat", "file", "theirs"]


def an_ended_job(**more: str) -> str:
    """Cancelled long ago, with an object that a row names and one that a crash left."""
    with session_scope() as session:
        job, _ = a_running_job(session, a_project(session))
        jobs.cancel(session, job)
        session.execute(update(Job).where(Job.id == job.id).values(finished_at=PAST))
        file = a_file(
            session, a_project(session), purpose="fine-tune-results", storage_key=f"jobs/{job.id}/a/metrics.csv"
        )
        metrics.attach_csv(session, job.id, file)
        session.commit()
    for name in ("metrics.csv", "lost.tar"):
        get_storage().put(f"jobs/{job.id}/a/{name}", io.BytesIO(b"bytes"))
    return job.id


def known(job_id: str) -> bool:
    with session_scope() as session:
        return session.get(Job, job_id) is not None


def test_a_job_long_ended_goes_and_leaves_no_bytes(tmp_path: Path, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("LORAINIT_JOB_DAYS", "0.01")
    get_settings.cache_clear()
    job_id = an_ended_job()
    age(tmp_path)
    janitor.sweep_orphans()  # comes before, since a job goes later than its orphans
    assert janitor.delete_jobs() is True
    janitor.clear()
    janitor.delete_jobs()
    assert not known(job_id)
    assert stored(tmp_path) == []
    assert janitor.delete_jobs() is False


def test_a_job_does_not_go_before_its_orphans(tmp_path: Path, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("LORAINIT_JOB_DAYS", "0.01")
    environment.setenv("LORAINIT_ORPHAN_DAYS", "3")
    get_settings.cache_clear()
    job_id = an_ended_job()
    assert janitor.delete_jobs() is False
    assert known(job_id)


def test_jobs_stay_for_ever_unless_somebody_wants_them_gone(tmp_path: Path) -> None:
    job_id = an_ended_job()
    assert janitor.delete_jobs() is False
    assert known(job_id)


def test_a_create_that_nobody_can_repeat_any_more_is_forgotten() -> None:
    with session_scope() as session:
        project = a_project(session)
        key = keys.create_key(session, project, name="k")[0]
        common = {"project_id": project.id, "api_key_id": key.id, "path": "/v1/x", "object_id": "o", "response": {}}
        for name, at in (("old", PAST), ("new", datetime.now(UTC))):
            session.add(Creation(id=name, idempotency_key=name, fingerprint=name, created_at=at, **common))
        session.commit()
    assert janitor.delete_old_creations() is False
    with session_scope() as session:
        assert session.scalars(select(Creation.id)).all() == ["new"]


@pytest.mark.parametrize("chore", [janitor.delete_checkpoints, janitor.sweep_orphans])
def test_0_days_keep_for_ever(chore: object, tmp_path: Path, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("LORAINIT_CHECKPOINT_DAYS", "0")
    environment.setenv("LORAINIT_ORPHAN_DAYS", "0")
    get_settings.cache_clear()
    project, _ = a_stored_file()
    get_storage().put(f"files/{project.id}/orphan", io.BytesIO(b"lost"))
    age(tmp_path)
    assert chore() is False  # type: ignore[operator]
    assert stored(tmp_path) == ["orphan", "x"]


def test_every_bytes_less_row_is_found_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    with session_scope() as session:
        project = a_project(session)
        for _ in range(130):
            a_file(session, project, deleted_at=PAST)
        session.commit()
    while janitor.clear():
        pass
    with session_scope() as session:
        assert session.scalars(select(File.id).where(File.cleared_at.is_(None))).all() == []


WRITER = """
import os, signal, sys
from api.core.files.storage import get_storage
def chunks():
    for _ in range(12):
        yield bytes(1 << 20)
    os.kill(os.getpid(), signal.SIGKILL)
get_storage().put(sys.argv[1], chunks())
"""


def test_what_a_killed_writer_left_of_an_object_goes_when_nobody_goes_on_with_it(tmp_path: Path) -> None:
    project, _ = a_stored_file()
    for key in (f"files/{project.id}/half", "files/proj_of-others/half"):
        assert subprocess.run([sys.executable, "-c", WRITER, key], check=False).returncode == -signal.SIGKILL
    assert stored(tmp_path) == ["half#1", "half#1", "x"]
    assert janitor.sweep_unfinished() is False
    assert stored(tmp_path) == ["half#1", "half#1", "x"]
    age(tmp_path)
    assert janitor.sweep_unfinished() is False
    assert [path.parent.name for path in (tmp_path / "storage").rglob("half#1")] == ["proj_of-others"]
    assert "x" in stored(tmp_path)
