"""Who may ask: keys, and the project a key speaks for."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy.orm import Session

from api.core.access import keys
from tests.api.conftest import JOBS, Lab, refused


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Basic abc", "sk-lorainit-x"])
def test_a_request_without_a_key_is_refused(lab: Lab, header: str) -> None:
    refused(lab.client.get("/v1/files", headers={"authorization": header}), 401, "missing_api_key")


@pytest.mark.parametrize(
    "change", [lambda s: s[:-1] + "?", lambda s: "sk-lorainit-x", lambda s: "sk-proj-abc", lambda s: "é"]
)
def test_a_wrong_key_is_refused(lab: Lab, change: object) -> None:
    secret = change(lab.secret)  # type: ignore[operator]
    headers = {"authorization": f"Bearer {secret}".encode()}
    error = refused(lab.client.get("/v1/files", headers=headers), 401, "invalid_api_key")
    assert lab.secret[20:-4] not in error["message"]


def test_an_expired_key_is_refused(lab: Lab, session: Session) -> None:
    past = datetime.now(UTC) - timedelta(seconds=1)
    _, secret = keys.create_key(session, lab.project, name="old", expires_at=past)
    session.commit()
    refused(lab.client.get("/v1/files", headers=bearer(secret)), 401, "invalid_api_key")


def test_a_deleted_key_is_refused_at_once(lab: Lab, session: Session) -> None:
    key, secret = keys.create_key(session, lab.project, name="gone")
    session.commit()
    assert lab.client.get("/v1/files", headers=bearer(secret)).status_code == 200
    assert keys.delete_key(session, key.id)
    session.commit()
    refused(lab.client.get("/v1/files", headers=bearer(secret)), 401, "invalid_api_key")


def test_another_project_known_here_is_refused(lab: Lab, stranger: Lab) -> None:
    headers = {"openai-project": stranger.project.id}
    refused(lab.client.get("/v1/files", headers=headers), 401, "mismatched_project")


@pytest.mark.parametrize("project", ["proj_unknown", "", "own"])
def test_an_unknown_project_or_organization_is_ignored(lab: Lab, project: str) -> None:
    name = lab.project.id if project == "own" else project
    headers = {"openai-project": name, "openai-organization": "org-x"}
    assert lab.client.get("/v1/files", headers=headers).status_code == 200


def test_a_key_is_asked_for_before_an_upload_is_read(lab: Lab) -> None:
    reply = lab.client.post("/v1/files", files={"file": ("a", b"x" * 10)}, headers={"authorization": ""})
    refused(reply, 401, "missing_api_key")


def test_a_wrong_body_without_a_key_is_a_401(lab: Lab) -> None:
    refused(lab.client.post(JOBS, json={}, headers={"authorization": ""}), 401, "missing_api_key")
