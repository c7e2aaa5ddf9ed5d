"""A client of the application, a project with a key, and short ways to upload and order."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from api.app import create_app
from api.core.access import keys
from api.core.db import database
from api.core.db.tables import File, Project
from api.routes import health
from tests.things import CHECKED, MODEL

ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
JSONL = "".join(json.dumps(ROW) + "\n" for _ in range(20)).encode()
JOBS = "/v1/fine_tuning/jobs"


@dataclass
class Lab:
    """One project and a client that speaks for it."""

    project: Project
    secret: str
    client: TestClient

    def upload(self, content: bytes = JSONL, **data: Any) -> dict[str, Any]:
        reply = self.client.post(
            "/v1/files", files={"file": ("train.jsonl", content)}, data={"purpose": "fine-tune", **data}
        )
        assert reply.status_code == 200, reply.text
        return reply.json()

    def order(self, training_file: str | None = None, **fields: Any) -> dict[str, Any]:
        body = {"model": MODEL, "training_file": training_file or self.upload()["id"], **fields}
        reply = self.client.post(JOBS, json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()


@pytest.fixture
def app(session: Session) -> Any:
    health.forget()
    return create_app()


def make_lab(session: Session, app: Any, name: str, *, role: keys.Role = "member") -> Lab:
    project = keys.get_or_create_project(session, name)
    _, secret = keys.create_key(session, project, name="test", role=role)
    session.commit()
    client = TestClient(app, headers={"authorization": f"Bearer {secret}"}, raise_server_exceptions=False)
    return Lab(project, secret, client)


def a_lab(role: keys.Role = "member") -> Lab:
    """For the fixture `service`: what several threads ask, each with a connection of its own."""
    with database.session_scope() as session:
        return make_lab(session, create_app(), "lab", role=role)


@pytest.fixture
def lab(session: Session, app: Any) -> Lab:
    return make_lab(session, app, "lab")


@pytest.fixture
def admin(session: Session, app: Any) -> Lab:
    """The same project as `lab`, with an admin's key."""
    return make_lab(session, app, "lab", role="admin")


@pytest.fixture
def stranger(session: Session, app: Any) -> Lab:
    """Another project on the same server."""
    return make_lab(session, app, "stranger", role="admin")


@pytest.fixture
def client(lab: Lab) -> TestClient:
    return lab.client


@dataclass
class Traces:
    """What there is: rows in every table, files in storage."""

    session: Session
    folder: Path

    def __call__(self) -> dict[str, int]:
        rows = {
            table.name: self.session.scalar(select(func.count()).select_from(table)) or 0
            for table in database.Base.metadata.sorted_tables
        }
        return {**rows, "stored": sum(path.is_file() for path in self.folder.rglob("*"))}


@pytest.fixture
def traces(session: Session, tmp_path: Path) -> Traces:
    return Traces(session, tmp_path / "storage")


def mark(session: Session, file_id: str, **columns: Any) -> None:
    """What the file check would write."""
    file = session.get_one(File, file_id, populate_existing=True)
    for name, value in {"status": "processed", "validation": CHECKED, **columns}.items():
        setattr(file, name, value)
    session.commit()


def refused(reply: Any, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    """The one error shape, with this code."""
    assert reply.status_code == status, reply.text
    assert list(reply.json()) == ["error"]
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert len(error["message"]) > 10
    assert reply.headers["x-request-id"].startswith("req_")
    return error
