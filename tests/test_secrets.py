"""What the service knows stays out of what it says: planted secrets, one whole run, every log, event and answer."""

import io
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
import redis
from sqlalchemy import Engine, select, text
from sqlalchemy.exc import DBAPIError

from api.core.access import keys
from api.core.db import database as db
from api.core.db import migrate
from api.core.db.database import session_scope
from api.core.settings import Settings
from tests import servers
from tests.conftest import forget
from tests.stack import Stack
from tests.test_job_path import assert_tells_what_ran, running, tiny_base, train

__all__ = ["tiny_base"]
PASSWORDS = {name: f"planted-{name}-swordfish" for name in ("database", "broker", "storage", "hosted")}


@pytest.fixture
def stack(
    monkeypatch: pytest.MonkeyPatch, postgres_server: str, tiny_base: Path, tmp_path: Path
) -> Iterator[tuple[Stack, str]]:
    """The whole service with a secret wherever one can stand, and the API key of its client."""
    database = servers.new_database(postgres_server, "secrets")
    logs = tmp_path / "logs"
    logs.mkdir()
    with ExitStack() as exits:
        broker = exits.enter_context(servers.valkey())
        with redis.Redis.from_url(broker) as server:
            server.config_set("requirepass", PASSWORDS["broker"])
        for name, value in {
            "LORAINIT_STATE_DIR": str(tmp_path),
            "LORAINIT_DATABASE_URL": database.replace("postgres@", f"postgres:{PASSWORDS['database']}@"),
            "LORAINIT_BROKER_URL": broker.replace("redis://", f"redis://:{PASSWORDS['broker']}@"),
            "LORAINIT_S3_SECRET_ACCESS_KEY": PASSWORDS["storage"],
            "OPENAI_API_KEY": PASSWORDS["hosted"],
            "LORAINIT_CATALOGUE": str(tiny_base / "catalogue.toml"),
            "LORAINIT_REQUESTS_PER_MINUTE": "6000",
            "LORAINIT_LOG_LEVEL": "debug",
        }.items():
            monkeypatch.setenv(name, value)
        forget()
        exits.callback(forget)
        migrate.upgrade(db.get_engine())
        with session_scope() as session:
            _, secret = keys.create_key(session, keys.get_or_create_project(session, "lab"), name="t", role="admin")
            session.commit()
        yield exits.enter_context(running(secret, logs)), secret


def rows() -> Iterator[str]:
    """Every row of the database as text, digests of keys included."""
    with session_scope(read_only=True) as session:
        for table in db.Base.metadata.sorted_tables:
            for row in session.execute(select(table)):
                yield f"{table.name}: {json.dumps(list(row), default=str)}"


def test_no_log_no_event_and_no_row_of_a_run_holds_a_secret(stack: tuple[Stack, str], tmp_path: Path) -> None:
    service, secret = stack
    made = service.client.post(
        f"/organization/projects/{_project()}/api_keys", cast_to=object, body={"name": "ci", "role": "member"}
    )
    planted = [*PASSWORDS.values(), *(key.split("-", 3)[3] for key in (secret, _value(made)))]  # may hold a "-" itself
    good = train(service)
    assert_tells_what_ran(service, good)  # as on SQLite, in tests/test_job_path.py
    bad = service.client.files.create(file=("bad.jsonl", io.BytesIO(b"{}\n")), purpose="fine-tune").id
    failed = service.client.fine_tuning.jobs.create(model="tiny", training_file=bad)
    assert service.wait(failed.id, "failed").status == "failed"
    for wrong in (secret[:-1] + "?", PASSWORDS["hosted"], ""):
        with pytest.raises(openai.AuthenticationError):
            service.client.with_options(api_key=wrong or "-").models.list()
    _break_things(service)

    texts = {path.name: path.read_text("utf-8", "replace") for path in service.logs.iterdir()}
    assert good.id in texts["worker"]
    assert "rate_limit_suspended" in texts["web"] and "unhandled" in texts["web"]  # the errors were really logged
    found = {f"{name}: {text[:300]}" for name, text in texts.items() for word in planted if word in text}
    found |= {row[:300] for row in rows() for word in planted if word in row}
    assert found == set()
    assert any(good.id in row for row in rows())


def test_an_error_of_the_database_is_told_without_its_values(engine: Engine) -> None:
    with engine.connect() as connection, pytest.raises(DBAPIError) as raised:
        connection.execute(text("SELECT * FROM nowhere WHERE x = :value"), {"value": "swordfish"})
    assert "nowhere" in str(raised.value) and "swordfish" not in str(raised.value)


def test_a_wrong_setting_is_told_without_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAINIT_PORT", "swordfish")
    with pytest.raises(ValueError, match="port") as raised:
        Settings()  # type: ignore[call-arg]
    assert "swordfish" not in str(raised.value)


def _break_things(service: Stack) -> None:
    """Errors are where secrets get out: a broker that refuses the password, a database that is told to stop."""
    import os

    with redis.Redis.from_url(os.environ["LORAINIT_BROKER_URL"]) as server:
        server.config_set("requirepass", "another")
        server.client_kill_filter(_type="normal", skipme=True)  # those who are in stay in otherwise
    file = service.upload()
    service.client.fine_tuning.jobs.create(model="tiny", training_file=file)
    with session_scope() as session:
        session.connection().exec_driver_sql("ALTER TABLE jobs RENAME TO jobs_away")
        session.commit()
    try:
        with pytest.raises(openai.InternalServerError):
            service.client.with_options(max_retries=0).fine_tuning.jobs.list()
        servers.time.sleep(1.5)
    finally:
        with session_scope() as session:
            session.connection().exec_driver_sql("ALTER TABLE jobs_away RENAME TO jobs")
            session.commit()


def _project() -> str:
    with session_scope(read_only=True) as session:
        return keys.get_or_create_project(session, "lab").id


def _value(made: Any) -> str:
    return str(made["value"])
