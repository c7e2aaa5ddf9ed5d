"""`lorainit keys`: made with a role, listed without secrets, deleted for good."""

from pathlib import Path

import pytest

from api.core import settings
from api.core.access import keys
from tests.api.cli.conftest import called, environment
from tests.conftest import forget


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "state"
    assert called("migrate", "--state", str(folder)).returncode == 0
    return folder


def caller_of(secret: str, state: Path, patch: pytest.MonkeyPatch) -> keys.Caller | None:
    patch.setenv("LORAINIT_STATE_DIR", str(state))
    patch.delenv("LORAINIT_DATABASE_URL", raising=False)
    forget()
    assert settings.get_settings().state_dir == state
    try:
        key = keys.find(keys.parse_key_id(secret))
        return key and keys.authenticate(key, secret)
    finally:
        forget()


def test_a_key_is_made_listed_and_deleted(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = called("keys", "create", "--state", str(state), "--role", "admin", "--name", "mine", "--project", "lab")
    assert made.returncode == 0, made.stderr
    secret = made.stdout.strip()
    caller = caller_of(secret, state, monkeypatch)
    assert caller is not None and caller.role == "admin"
    assert caller.project_id in made.stderr
    listed = called("keys", "list", "--state", str(state)).stdout
    (row,) = [line.split() for line in listed.splitlines() if line.startswith(caller.key_id)]
    assert row[1:5] == ["lab", "admin", "mine", f"...{secret[-4:]}"]
    assert secret.split("-", 3)[3] not in listed
    assert "deleted" in called("keys", "delete", caller.key_id, "--state", str(state)).stdout
    assert caller_of(secret, state, monkeypatch) is None
    again = called("keys", "delete", caller.key_id, "--state", str(state))
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr.strip() == f"error: there is no key {caller.key_id}."


def test_a_key_is_a_members_unless_somebody_says_admin(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caller = caller_of(called("keys", "create", "--state", str(state)).stdout.strip(), state, monkeypatch)
    assert caller is not None and caller.role == "member"


def test_where_there_is_no_database_its_password_is_not_shown() -> None:
    url = "postgresql://someone:swordfish@127.0.0.1:1/none"
    done = called("keys", "list", env=environment(LORAINIT_DATABASE_URL=url))
    assert done.returncode != 0
    assert "swordfish" not in done.stdout + done.stderr
