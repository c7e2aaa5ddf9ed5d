"""The cache of a worker's host: what goes with the files that it was made of, and what stays."""

import os
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from api.core.db.tables import Project, Worker
from api.core.files import files
from api.core.settings import get_settings
from lorainit.config.cache_names import entry_name
from tests.things import a_file, a_project
from worker import app
from worker.host import caches

A, B = "a" * 64, "b" * 64


def an_entry(project: Project | str | None, *digests: str, kind: str = "tokens", key: str = "k" * 40) -> Path:
    owner = project.id if isinstance(project, Project) else project
    path = get_settings().models() / kind / f"{entry_name(key, owner=owner, files=digests)}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"tokens")
    return path


@pytest.fixture
def project(session: Session) -> Project:
    return a_project(session)


def test_an_entry_goes_when_its_file_is_deleted_and_not_before(session: Session, project: Project) -> None:
    file, entry = a_file(session, project, sha256=A), an_entry(project, A)
    assert caches.sweep() == []
    files.mark_deleted(session, file)
    session.flush()
    assert caches.sweep() == [entry]
    assert not entry.exists()


def test_what_two_files_share_stays_while_one_of_them_lives(session: Session, project: Project) -> None:
    first, second = a_file(session, project, sha256=A), a_file(session, project, sha256=A)
    an_entry(project, A)
    files.mark_deleted(session, first)
    session.flush()
    assert caches.sweep() == []
    files.mark_deleted(session, second)
    session.flush()
    assert len(caches.sweep()) == 1


def test_the_same_bytes_in_another_project_keep_nothing(session: Session, project: Project) -> None:
    a_file(session, a_project(session, "others"), sha256=A)
    entry = an_entry(project, A)
    assert caches.sweep() == [entry]


def test_an_entry_of_two_files_goes_with_either(session: Session, project: Project) -> None:
    a_file(session, project, sha256=A)
    entry = an_entry(project, A, B, kind="init")
    assert caches.sweep() == [entry]


def test_what_a_crashed_writer_left_goes_with_its_file(session: Session, project: Project) -> None:
    a_file(session, project, sha256=A)
    living, dead, old = (an_entry(project, digest) for digest in (A, B, A))
    living, dead = (path.rename(path.with_name(f".{path.stem}-0123456789abcdef")) for path in (living, dead))
    old = an_entry(project, A)
    old = old.rename(old.with_name(f".{old.stem}-fedcba9876543210"))
    os.utime(old, (time.time() - 4000,) * 2)
    assert set(caches.sweep()) == {dead, old}
    assert living.exists()


def test_what_is_of_the_base_alone_stays(session: Session) -> None:
    an_entry(None, kind="init")
    an_entry(None, A, kind="bases")
    assert caches.sweep() == []


def test_entries_of_earlier_releases_go(session: Session) -> None:
    folder = get_settings().models() / "tokens"
    folder.mkdir(parents=True)
    (folder / f"{'0' * 40}.safetensors").write_bytes(b"whose rows these are, nobody knows")
    assert len(caches.sweep()) == 1


def test_a_file_whose_time_is_over_is_there_until_it_is_deleted(session: Session, project: Project) -> None:
    a_file(session, project, sha256=A, expires_at=datetime(2026, 1, 1, tzinfo=UTC))
    an_entry(project, A)
    assert caches.sweep() == []


def test_more_files_than_one_statement_asks_for(session: Session, project: Project) -> None:
    wanted = {(project.id, f"{number:064x}") for number in range(1100)}
    for number in (0, 700, 1099):
        a_file(session, project, sha256=f"{number:064x}")
    assert {int(sha256, 16) for _, sha256 in files.find_existing(session, wanted)} == {0, 700, 1099}


def test_a_worker_sweeps_with_its_heartbeat(
    session: Session, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = threading.Event()
    stopped.set()
    monkeypatch.setattr(app, "_stopped", stopped)
    entry = an_entry(project, A)
    app._send_heartbeats()
    assert not entry.exists()
    assert session.scalars(select(Worker.id)).all()


def test_kernels_go_when_they_are_old(session: Session) -> None:
    folder = get_settings().models() / "kernels" / "ab"
    folder.mkdir(parents=True)
    old, new = folder / "old.so", folder / "new.so"
    for path in (old, new):
        path.write_bytes(b"")
    os.utime(old, (0, time.time() - caches.KERNEL_SECONDS - 60))
    assert caches.sweep() == [old]
    assert new.exists()
