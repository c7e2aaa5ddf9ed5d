"""Settings: what is wrong is said at once, by the variable's name and without its value."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from api.core.settings import BadSettings, Settings, find_unknown_variables, get_settings
from tests.things import ON_ONE_DATABASE


def _is_number(field: FieldInfo) -> bool:
    return field.annotation in (int, float)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("PORT", "abc", "must be a valid integer"),
        ("PORT", "70000", "must be less than or equal to 65535"),
        ("LEASE_SECONDS", "inf", "must be a finite number"),
        ("LOG_LEVEL", "loud", "must be 'debug', 'info', 'warning', 'error' or 'critical'"),
        ("LOG_FORMAT", "xml", "must be 'json' or 'console'"),
        ("DATABASE_URL", "mysql://swordfish@host/x", "begins with postgresql:// or "),
        ("DATABASE_URL", "postgresql://me:sword/fish@host/x", "percent-encoded"),
        ("BROKER_URL", "amqp://swordfish@host", "begins with redis:// or rediss://"),
        ("STORAGE_URL", "/swordfish", "begins with file:// or s3://"),
        ("DATABASE_URL", "postgresql+asyncpg://me:swordfish@host/x", "begins with postgresql:// or "),
        ("DATABASE_URL", "sqlite:///", "must name a file"),
        ("DATABASE_URL", "sqlite:///:memory:", "must name a file"),
        ("STORAGE_URL", "file://relative/swordfish", "with three slashes"),
        ("STORAGE_URL", "file:///", "with three slashes"),
        ("STORAGE_URL", "s3://", "must name a bucket"),
        ("S3_ENDPOINT", "ftp://swordfish", "begins with http:// or https://"),
        ("STATE_DIR", "/etc/passwd", "must be a folder"),
        ("STATE_DIR", " ", "is blank"),
        ("HOST", "not a host", "match pattern"),
        ("WORKER_QUEUES", "train,;slow", "must be names of small letters"),
        ("WORKER_QUEUES", ",", "must name at least one queue"),
        ("BEAT_SECONDS", "20", "must be at most half of LORAINIT_LEASE_SECONDS"),
        ("LEASE_SECONDS", "1e23", "must be less than or equal to 86400"),
        ("RECONCILE_SECONDS", "1e23", "must be less than or equal to 86400"),
        ("CHECKPOINT_DAYS", "800000", "must be less than or equal to 36500"),
        ("PROJECT_RUNNING", "9999999999999999999999", "must be less than or equal to"),
        ("ORGANIZATION", "Åse", "match pattern"),
        ("MAX_BODY_BYTES", "0", "must be greater than or equal to 1"),
    ],
)
@ON_ONE_DATABASE
def test_a_wrong_setting_is_one_sentence(name: str, value: str, words: str, environment: pytest.MonkeyPatch) -> None:
    environment.setenv(f"LORAINIT_{name}", value)
    get_settings.cache_clear()
    with pytest.raises(BadSettings, match=f"^wrong settings in the environment: LORAINIT_{name}: ") as raised:
        get_settings()
    assert words in str(raised.value)
    assert "swordfish" not in str(raised.value)


def test_queues_are_the_same_for_the_worker_and_for_what_it_says_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAINIT_WORKER_QUEUES", " train, slow ,")
    settings = Settings()
    assert (settings.worker_queues, settings.queues()) == ("train,slow", ("train", "slow"))


@pytest.mark.parametrize("name", [name for name, field in Settings.model_fields.items() if _is_number(field)])
def test_no_number_is_without_end(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"LORAINIT_{name.upper()}", "9" * 30)
    with pytest.raises(ValidationError, match="less than or equal to"):
        Settings()


@pytest.mark.parametrize("name", Settings.model_fields)
def test_an_empty_variable_is_one_that_is_not_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(f"LORAINIT_{name.upper()}", raising=False)
    absent = getattr(Settings(), name)
    monkeypatch.setenv(f"LORAINIT_{name.upper()}", "")
    assert getattr(Settings(), name) == absent


def test_a_misspelt_variable_is_told_with_the_one_it_resembles() -> None:
    assert find_unknown_variables(["LORAINIT_PROT", "LORAINIT_PORT", "lorainit_host", "HOME", "LORAINIT_XYZZY"]) == [
        "LORAINIT_PROT is no setting (LORAINIT_PORT?)",
        "LORAINIT_XYZZY is no setting",
    ]


@pytest.mark.parametrize("program", ["api.server", "worker.reconciler", "celery -A worker.app worker"])
@pytest.mark.parametrize(
    ("name", "value", "words"), [("PORT", "abc", "LORAINIT_PORT"), ("CATALOGUE", "none.toml", "none.toml")]
)
@ON_ONE_DATABASE
def test_no_process_starts_with_what_it_cannot_use(
    program: str, name: str, value: str, words: str, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment.setenv(f"LORAINIT_{name}", value)
    done = subprocess.run(
        [sys.executable, "-m", *program.split()], capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path
    )
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert done.stderr.startswith("error: ")
    assert words in done.stderr


@ON_ONE_DATABASE
def test_the_api_says_which_address_is_none(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment.setenv("LORAINIT_HOST", "no-such-host.invalid")
    done = subprocess.run(
        [sys.executable, "-m", "api.server"], capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: LORAINIT_HOST: 'no-such-host.invalid' is not an address")
