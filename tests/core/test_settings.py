"""Settings: what is wrong is said at once, by the variable's name and without its value."""

import subprocess
import sys
from pathlib import Path

import pytest

from api.core.settings import BadSettings, Settings, get_settings, unknown_variables


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("PORT", "abc", "must be a valid integer"),
        ("PORT", "70000", "must be less than or equal to 65535"),
        ("LEASE_SECONDS", "inf", "must be a finite number"),
        ("LOG_LEVEL", "loud", "must be 'debug', 'info', 'warning', 'error' or 'critical'"),
        ("LOG_FORMAT", "xml", "must be 'json' or 'console'"),
        ("DATABASE_URL", "mysql://swordfish@host/x", "begins with postgresql:// or sqlite://"),
        ("DATABASE_URL", "postgresql://me:sword/fish@host/x", "percent-encoded"),
        ("BROKER_URL", "amqp://swordfish@host", "begins with redis:// or rediss://"),
        ("STORAGE_URL", "/swordfish", "begins with file:// or s3://"),
        ("WORKER_QUEUES", " ,", "must name at least one queue"),
        ("ORGANIZATION", "Åse", "match pattern"),
        ("MAX_BODY_BYTES", "0", "must be greater than or equal to 1"),
    ],
)
def test_a_wrong_setting_is_one_sentence(name: str, value: str, words: str, environment: pytest.MonkeyPatch) -> None:
    environment.setenv(f"LORAINIT_{name}", value)
    get_settings.cache_clear()
    with pytest.raises(BadSettings, match=f"^wrong settings in the environment: LORAINIT_{name}: ") as raised:
        get_settings()
    assert words in str(raised.value)
    assert "swordfish" not in str(raised.value)


@pytest.mark.parametrize("name", Settings.model_fields)
def test_an_empty_variable_is_one_that_is_not_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(f"LORAINIT_{name.upper()}", raising=False)
    absent = getattr(Settings(), name)
    monkeypatch.setenv(f"LORAINIT_{name.upper()}", "")
    assert getattr(Settings(), name) == absent


def test_a_misspelt_variable_is_told_with_the_one_it_resembles() -> None:
    assert unknown_variables(["LORAINIT_PROT", "LORAINIT_PORT", "lorainit_host", "HOME", "LORAINIT_XYZZY"]) == [
        "LORAINIT_PROT is no setting (LORAINIT_PORT?)",
        "LORAINIT_XYZZY is no setting",
    ]


@pytest.mark.parametrize("program", ["api.server", "worker.reconciler", "celery -A worker.app worker"])
@pytest.mark.parametrize(
    ("name", "value", "words"), [("PORT", "abc", "LORAINIT_PORT"), ("CATALOGUE", "none.toml", "none.toml")]
)
def test_no_process_starts_with_what_it_cannot_use(
    program: str, name: str, value: str, words: str, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment.setenv(f"LORAINIT_{name}", value)
    done = subprocess.run(
        [sys.executable, "-m", *program.split()], capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path
    )
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
