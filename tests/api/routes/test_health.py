"""Health, and an OpenAPI document that tells the truth."""

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from api.core.files.storage import ObjectStorage
from api.routes import health
from tests.api.conftest import Lab
from tests.things import a_worker

ROUTES = {
    "/v1/files": {"get", "post"},
    "/v1/files/{file_id}": {"get", "delete"},
    "/v1/files/{file_id}/content": {"get"},
    "/v1/fine_tuning/jobs": {"get", "post"},
    "/v1/experiments": {"get", "post"},
    "/v1/experiments/{experiment_id}": {"get", "delete"},
    "/v1/experiments/{experiment_id}/cancel": {"post"},
    "/v1/experiments/{experiment_id}/report": {"get"},
    "/v1/fine_tuning/jobs/{fine_tuning_job_id}": {"get"},
    "/v1/fine_tuning/jobs/{fine_tuning_job_id}/cancel": {"post"},
    "/v1/fine_tuning/jobs/{fine_tuning_job_id}/pause": {"post"},
    "/v1/fine_tuning/jobs/{fine_tuning_job_id}/resume": {"post"},
    "/v1/fine_tuning/jobs/{fine_tuning_job_id}/events": {"get"},
    "/v1/fine_tuning/jobs/{fine_tuning_job_id}/events/stream": {"get"},
    "/v1/fine_tuning/jobs/{fine_tuning_job_id}/checkpoints": {"get"},
    "/v1/fine_tuning/jobs/{fine_tuning_job_id}/adapter": {"get"},
    "/v1/models": {"get"},
    "/v1/models/{model}": {"get", "delete"},
    "/v1/lora/methods": {"get"},
    "/v1/lora/methods/{method}": {"get"},
    "/v1/organization/projects/{project_id}/api_keys": {"get", "post"},
    "/v1/organization/projects/{project_id}/api_keys/{key_id}": {"get", "delete"},
    "/healthz": {"get"},
    "/readyz": {"get"},
}


def test_healthz_looks_at_nothing(lab: Lab) -> None:
    reply = lab.client.get("/healthz", headers={"authorization": ""})
    assert (reply.status_code, reply.json()) == (200, {"status": "ok"})


def test_readyz_counts_the_workers_heard_of_lately(lab: Lab, session: Session) -> None:
    a_worker(session)
    a_worker(session, seen_at=datetime.now(UTC) - timedelta(seconds=31))
    session.commit()
    reply = lab.client.get("/readyz")
    assert reply.status_code == 200
    assert reply.json()["checks"] == {
        "database": "ok", "storage": "ok", "queue": "not configured", "migrations": "ok", "workers": 1,
        "catalogue": "ok",
    }  # fmt: skip


def test_no_storage_is_not_ready(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_: object) -> None:
        raise OSError("no storage")

    monkeypatch.setattr(ObjectStorage, "probe", gone)
    reply = lab.client.get("/readyz")
    assert (reply.status_code, reply.json()["checks"]["storage"]) == (503, "unreachable")


@pytest.mark.parametrize("part", ["storage", "database"])
def test_one_bad_moment_takes_no_service_out(lab: Lab, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    assert lab.client.get("/readyz").status_code == 200
    clock = time.monotonic
    with monkeypatch.context() as broken:
        broken.setattr({"storage": health._storage(), "database": health._database()}[part], "_check", broken_look)
        broken.setattr(
            {"storage": health._storage(), "database": health._database()}[part], "_clock", lambda: clock() + 60
        )
        reply = lab.client.get("/readyz")
    assert (reply.status_code, reply.json()["checks"][part]) == (200, "ok")


def broken_look() -> None:
    raise OSError("just now it did not answer")


def test_missing_migrations_are_not_ready(lab: Lab, session: Session) -> None:
    session.execute(text("UPDATE alembic_version SET version_num = 'fb698f45d0e2'"))
    session.commit()
    assert lab.client.get("/readyz").json()["checks"]["migrations"] == "missing"


def test_no_database_is_not_ready_but_healthy(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(*_: Any, **__: Any) -> None:
        raise OSError("no database")

    monkeypatch.setattr(health, "session_scope", down)
    assert lab.client.get("/readyz").status_code == 503
    assert lab.client.get("/healthz").status_code == 200


def test_the_document_has_every_route_and_no_other(lab: Lab) -> None:
    paths = lab.client.get("/openapi.json").json()["paths"]
    assert {path: set(verbs) for path, verbs in paths.items()} == ROUTES


def test_the_document_shows_our_errors_and_never_a_422(lab: Lab) -> None:
    document = lab.client.get("/openapi.json").json()
    for path in document["paths"].values():
        for operation in path.values():
            assert "422" not in operation["responses"]
            schema = operation["responses"]["500"]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/ErrorBody"}
    assert "HTTPValidationError" not in document["components"]["schemas"]
    upload = document["paths"]["/v1/files"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert upload["required"] == ["file", "purpose"]
