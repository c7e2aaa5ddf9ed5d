"""The doctor: each check says what is wrong, and one that fails hides no other."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from api.core.db import migrate
from api.core.files.storage import ObjectStorage
from api.core.maintenance import doctor
from api.core.models import catalogue
from api.core.settings import get_settings
from tests import servers
from tests.conftest import forget

pytestmark = pytest.mark.usefixtures("service")


def found() -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.examine()}


def statuses() -> dict[str, str]:
    return {name: check.status for name, check in found().items()}


def test_a_healthy_host_passes(environment: pytest.MonkeyPatch, valkey_url: str) -> None:
    environment.setenv("LORAINIT_BROKER_URL", valkey_url)
    forget()
    assert set(statuses().values()) == {"ok"}
    assert {"database", "migrations", "clock", "broker", "storage", "disk of scratch", "disk of storage"} <= set(
        found()
    )


def test_no_broker_of_its_own_is_no_fault() -> None:
    checks = list(doctor.examine())
    assert {check.name for check in checks if check.status == "absent"} == {"broker"}
    assert doctor.as_json(checks)["ok"] is True


def test_a_broker_that_does_not_answer_fails_alone(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("LORAINIT_BROKER_URL", f"redis://127.0.0.1:{servers.free_port()}/0")
    forget()
    checks = list(doctor.examine())
    assert [check.name for check in checks if check.status == "failed"] == ["broker"]
    assert doctor.as_json(checks)["ok"] is False


def test_a_database_that_is_not_there_fails_with_its_own_words(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("LORAINIT_DATABASE_URL", f"postgresql://postgres@127.0.0.1:{servers.free_port()}/x")
    forget()
    checks = found()
    assert (checks["database"].status, checks["storage"].status) == ("failed", "ok")
    assert "refused" in checks["database"].message
    assert "sqlalche" not in checks["database"].message
    assert not {"migrations", "clock"} & set(checks)  # which would say the same again


def test_a_missing_migration_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrate, "is_current", lambda _: False)
    assert "lorainit migrate" in found()["migrations"].message
    assert statuses()["migrations"] == "failed"


def test_storage_that_cannot_be_written_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_: object) -> None:
        raise OSError("read-only file system")

    monkeypatch.setattr(ObjectStorage, "probe", gone)
    assert found()["storage"] == doctor.Check("storage", "failed", "read-only file system")


def test_a_disk_below_the_floor_fails(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("LORAINIT_MIN_FREE_BYTES", str(2**62))
    get_settings.cache_clear()
    assert statuses()["disk of scratch"] == "failed"


def test_a_clock_that_is_off_fails(monkeypatch: pytest.MonkeyPatch, database_url: str) -> None:
    monkeypatch.setattr(doctor, "now", lambda _: datetime.now(UTC) + timedelta(seconds=5))
    check = found()["clock"]
    if database_url.startswith("sqlite"):
        assert check.message == "the database has this host's clock"
    else:
        assert check.status == "failed"
        assert "+5.0 s" in check.message


def test_it_leaves_no_trace(tmp_path: Path) -> None:
    list(doctor.examine())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_catalogue_that_cannot_be_used_fails_with_its_place(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text("[[models]]\nid = 'x'\n")
    environment.setenv("LORAINIT_CATALOGUE", str(path))
    forget()
    assert (found()["catalogue"].status, found()["database"].status) == ("failed", "ok")
    assert f"{path}, line 1: models[0].root" in found()["catalogue"].message


def test_a_base_model_that_is_not_here_fails_where_jobs_run(environment: pytest.MonkeyPatch) -> None:
    environment.setattr(catalogue, "find_missing_sources", lambda: ["model 'x': it is gone."])
    assert (found()["catalogue"].status, "it is gone" in found()["catalogue"].message) == ("failed", True)
    environment.setattr(doctor, "find_spec", lambda _: None)  # the API's container
    assert found()["catalogue"].status == "ok"


def test_settings_that_cannot_be_read_are_the_only_check(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("LORAINIT_PORT", "abc")
    get_settings.cache_clear()
    assert statuses() == {"settings": "failed"}


def test_a_variable_that_nothing_reads_fails(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("LORAINIT_PROT", "9000")
    assert found()["settings"].message == "LORAINIT_PROT is no setting (LORAINIT_PORT?): nothing reads it"
