"""An older database beside newer storage: what it does not know may be somebody's adapter, and stays."""

import io
import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, select

from api.core.db import database
from api.core.db.database import session_scope
from api.core.db.tables import StoragePeriod
from api.core.files.storage import get_storage
from api.core.maintenance import storage_periods
from api.core.settings import get_settings
from tests.things import a_project
from worker.maintenance import janitor

pytestmark = pytest.mark.usefixtures("service")

HALF_AN_HOUR = 0.5 / 24
Backup = Mapping[str, Sequence[Mapping[str, Any]]]


def back_up(engine: Engine) -> Backup:
    """Every row of the database."""
    with engine.connect() as connection:
        tables = database.Base.metadata.sorted_tables
        return {table.name: [dict(row) for row in connection.execute(select(table)).mappings()] for table in tables}


def restore(engine: Engine, backup: Backup) -> None:
    """The database is what it was, and storage is left as it is."""
    with engine.begin() as connection:
        for table in reversed(database.Base.metadata.sorted_tables):
            connection.execute(table.delete())
        for table in database.Base.metadata.sorted_tables:
            if backup[table.name]:
                connection.execute(table.insert(), list(backup[table.name]))


def a_known_project() -> str:
    with session_scope() as session:
        project = a_project(session)
        session.commit()
        return project.id


def store(project: str, name: str) -> None:
    """An object that no row of this database names."""
    get_storage().put(f"files/{project}/{name}", io.BytesIO(b"bytes"))


def stored(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "storage" / "files").rglob("*") if path.is_file())


def days_pass(folder: Path, days: float) -> None:
    """Everything that has happened so far happened so many days earlier."""
    for path in (folder / "storage").rglob("*"):
        age(path, days)
    age_watches(days)


def keep_watch_for_days(folder: Path, days: int) -> None:
    """As if the reconciler had looked once a minute."""
    for _ in range(days):
        days_pass(folder, 1)
        with session_scope() as session:
            last = session.scalars(select(StoragePeriod).order_by(StoragePeriod.since.desc())).first()
            assert last is not None
            last.until += timedelta(days=1)
            session.commit()
        janitor.check_storage_owner()


def age(path: Path, days: float) -> None:
    written = path.stat().st_mtime - days * 86400
    os.utime(path, (written, written))


def age_watches(days: float) -> None:
    with session_scope() as session:
        for watch in session.scalars(select(StoragePeriod)):
            watch.since -= timedelta(days=days)
            watch.until -= timedelta(days=days)
        session.commit()


def spans() -> int:
    with session_scope(read_only=True) as session:
        return len(session.scalars(select(StoragePeriod.id)).all())


def test_an_older_database_removes_nothing_that_a_newer_one_may_have_known(engine: Engine, tmp_path: Path) -> None:
    project = a_known_project()
    janitor.check_storage_owner()
    backup = back_up(engine)
    janitor.check_storage_owner()
    store(project, "newer")
    restore(engine, backup)
    janitor.check_storage_owner()
    keep_watch_for_days(tmp_path, 3)
    janitor.sweep_orphans()
    assert stored(tmp_path) == ["newer"]


def test_a_restored_database_removes_orphans_again_that_are_younger_than_the_restore(
    engine: Engine, tmp_path: Path
) -> None:
    project = a_known_project()
    janitor.check_storage_owner()
    backup = back_up(engine)
    janitor.check_storage_owner()
    store(project, "newer")
    days_pass(tmp_path, 1)
    restore(engine, backup)
    janitor.check_storage_owner()
    store(project, "orphan")
    keep_watch_for_days(tmp_path, 2)
    janitor.sweep_orphans()
    assert stored(tmp_path) == ["newer"]


def test_a_service_that_is_restarted_removes_what_was_left_just_before(tmp_path: Path) -> None:
    project = a_known_project()
    janitor.check_storage_owner()
    store(project, "orphan")
    days_pass(tmp_path, HALF_AN_HOUR)
    janitor.check_storage_owner()
    keep_watch_for_days(tmp_path, 2)
    janitor.sweep_orphans()
    assert stored(tmp_path) == []


def test_an_old_mark_that_was_restored_with_the_database_hides_nothing(engine: Engine, tmp_path: Path) -> None:
    project = a_known_project()
    janitor.check_storage_owner()
    backup, mark = back_up(engine), {path: path.read_bytes() for path in _marks()}
    janitor.check_storage_owner()
    store(project, "newer")
    days_pass(tmp_path, 1)
    restore(engine, backup)
    age_watches(1)
    for path, content in mark.items():
        path.write_bytes(content)
    janitor.check_storage_owner()
    keep_watch_for_days(tmp_path, 2)
    janitor.sweep_orphans()
    assert stored(tmp_path) == ["newer"]


def test_before_the_first_look_after_a_restore_nothing_younger_is_removed(engine: Engine, tmp_path: Path) -> None:
    project = a_known_project()
    janitor.check_storage_owner()
    backup = back_up(engine)
    store(project, "newer")
    days_pass(tmp_path, 2)
    restore(engine, backup)
    janitor.sweep_orphans()
    assert stored(tmp_path) == ["newer"]


def test_two_databases_on_one_storage_remove_nothing_of_each_other(engine: Engine, tmp_path: Path) -> None:
    project = a_known_project()
    janitor.check_storage_owner()
    copies = [back_up(engine)] * 2

    def both_look(days: float) -> None:
        for path in (tmp_path / "storage").rglob("*"):
            age(path, days)
        for number in (0, 1):
            restore(engine, copies[number])
            age_watches(days)
            janitor.check_storage_owner()
            janitor.sweep_orphans()
            copies[number] = back_up(engine)

    both_look(0)
    store(project, "of-one-of-them")
    for _ in range(60):
        both_look(HALF_AN_HOUR * 1.5)
    assert stored(tmp_path) == ["of-one-of-them"]


def test_looks_that_fail_one_after_another_add_no_rows() -> None:
    for _ in range(4):
        janitor.check_storage_owner()
        for path in _marks():
            path.write_text("another database's")
    assert spans() == 1


def _marks() -> list[Path]:
    return list((get_settings().state_dir / "storage" / storage_periods.FOLDER).iterdir())


def test_a_look_that_breaks_off_before_or_after_its_mark_goes_on_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    janitor.check_storage_owner()

    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    days_pass(tmp_path, HALF_AN_HOUR)
    for owner, name in ((type(get_storage()), "put"), (storage_periods, "confirm_period")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, crash)
            with pytest.raises(KeyboardInterrupt):
                janitor.check_storage_owner()
    janitor.check_storage_owner()
    assert spans() == 1
    with session_scope(read_only=True) as session:
        ((since, until),) = storage_periods.list_periods(session)
    assert until + timedelta(hours=1) - since > timedelta(minutes=29)


def test_of_two_looks_at_once_one_gives_way() -> None:
    janitor.check_storage_owner()
    with session_scope() as session:
        seen = storage_periods.find_newest(session)
        assert seen is not None
        assert storage_periods.extend_period(session, seen, seen.token) is not None
        assert storage_periods.extend_period(session, seen, seen.token) is None
        session.commit()
    janitor.check_storage_owner()
    assert spans() == 1
