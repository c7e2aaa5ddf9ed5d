"""What the service knows stays out of what it says; of a whole run with planted secrets: tests/test_job_path.py."""

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from api.core.settings import Settings


def test_an_error_of_the_database_is_told_without_its_values(engine: Engine) -> None:
    with engine.connect() as connection, pytest.raises(DBAPIError) as raised:
        connection.execute(text("SELECT * FROM nowhere WHERE x = :value"), {"value": "swordfish"})
    assert "nowhere" in str(raised.value) and "swordfish" not in str(raised.value)


def test_a_wrong_setting_is_told_without_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAINIT_PORT", "swordfish")
    with pytest.raises(ValueError, match="port") as raised:
        Settings()  # type: ignore[call-arg]
    assert "swordfish" not in str(raised.value)
