"""Secrets that are planted in a running service, what makes it tell them if anything does, and where they may be.

tests/test_job_path.py plants them, and looks for them in the end.
"""

import json
import os
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import redis
from sqlalchemy import select

from api.core.access import keys
from api.core.db import database
from api.core.db.database import session_scope
from tests.stack import Stack

PASSWORDS = {name: f"planted-{name}-swordfish" for name in ("database", "broker", "storage", "hosted")}


def with_password(database_url: str) -> str:
    """The same database; the tests' PostgreSQL takes any password."""
    return database_url.replace("postgres@", f"postgres:{PASSWORDS['database']}@")


def plant(broker: str) -> dict[str, str]:
    """Settings of a service that knows secrets; the broker of this address asks for its password from now on."""
    with redis.Redis.from_url(broker) as server:
        server.config_set("requirepass", PASSWORDS["broker"])
    return {
        "LORAINIT_BROKER_URL": broker.replace("redis://", f"redis://:{PASSWORDS['broker']}@"),
        "LORAINIT_S3_SECRET_ACCESS_KEY": PASSWORDS["storage"],
        "OPENAI_API_KEY": PASSWORDS["hosted"],
        "LORAINIT_REQUESTS_PER_MINUTE": "6000",
    }


def keys_of(service: Stack) -> list[str]:
    """The secret parts of its client's key, and of one that the client makes."""
    with session_scope(read_only=True) as session:
        project = keys.get_or_create_project(session, "lab").id
    path, body = f"/organization/projects/{project}/api_keys", {"name": "ci", "role": "member"}
    made: Any = service.client.post(path, cast_to=object, body=body)
    return [key.split("-", 3)[3] for key in (service.client.api_key, str(made["value"]))]  # may hold a "-" itself


def be_refused(service: Stack) -> None:
    """Come with keys that are none."""
    for wrong in (service.client.api_key[:-1] + "?", PASSWORDS["hosted"], "-"):
        with pytest.raises(openai.AuthenticationError):
            service.client.with_options(api_key=wrong).models.list()


def break_things(service: Stack) -> None:
    """A broker that refuses the password from now on, a table that is away for a moment."""
    with redis.Redis.from_url(os.environ["LORAINIT_BROKER_URL"]) as server:
        server.config_set("requirepass", "another")
        server.client_kill_filter(_type="normal", skipme=True)  # those who are in stay in otherwise
    service.client.fine_tuning.jobs.create(model="tiny", training_file=service.upload())
    _rename("jobs", "jobs_away")
    try:
        with pytest.raises(openai.InternalServerError):
            service.client.with_options(max_retries=0).fine_tuning.jobs.list()
        time.sleep(1.5)  # for the other processes to notice
    finally:
        _rename("jobs_away", "jobs")


def _rename(table: str, name: str) -> None:
    with session_scope() as session:
        session.connection().exec_driver_sql(f"ALTER TABLE {table} RENAME TO {name}")
        session.commit()


def rows() -> Iterator[str]:
    """Every row of the database as text, digests of keys included."""
    with session_scope(read_only=True) as session:
        for table in database.Base.metadata.sorted_tables:
            for row in session.execute(select(table)):
                yield f"{table.name}: {json.dumps(list(row), default=str)}"
