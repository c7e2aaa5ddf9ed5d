"""Roles and the keys of a project over HTTP: who may see, make and delete them, and that a secret is shown once."""

import json
from typing import Any

import pytest
from openai import OpenAI
from sqlalchemy import select
from sqlalchemy.orm import Session

from api.core.db import database
from api.core.db.tables import ApiKey
from tests.api.conftest import JOBS, Lab, refused
from tests.things import MODEL

pytestmark = pytest.mark.one_database


def keys_path(lab: Lab, key_id: str = "") -> str:
    return f"/v1/organization/projects/{lab.project.id}/api_keys" + (f"/{key_id}" if key_id else "")


def made(admin: Lab, **fields: Any) -> dict[str, Any]:
    reply = admin.client.post(keys_path(admin), json={"name": "ci", **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def test_a_new_key_works_at_once_and_shows_its_secret_once(admin: Lab) -> None:
    key = made(admin)
    assert admin.client.get("/v1/files", headers=bearer(key["value"])).status_code == 200
    looks = [admin.client.get(keys_path(admin, key["id"])), admin.client.get(keys_path(admin))]
    assert all(look.status_code == 200 and key["value"] not in look.text for look in looks)
    assert looks[0].json()["redacted_value"] == f"sk-lorainit-...{key['value'][-4:]}"


def test_no_row_of_the_database_holds_a_secret(admin: Lab, session: Session) -> None:
    secret = made(admin)["value"]
    for table in database.Base.metadata.sorted_tables:
        for row in session.execute(select(table)):
            assert secret[-20:] not in json.dumps(list(row), default=str), table.name


def test_a_deleted_key_opens_nothing_from_then_on(admin: Lab) -> None:
    key = made(admin)
    gone = admin.client.delete(keys_path(admin, key["id"])).json()
    assert gone == {"id": key["id"], "object": "organization.project.api_key.deleted", "deleted": True}
    refused(admin.client.get("/v1/files", headers=bearer(key["value"])), 401, "invalid_api_key")
    refused(admin.client.get(keys_path(admin, key["id"])), 404, "key_not_found", "key_id")
    refused(admin.client.delete(keys_path(admin, key["id"])), 404, "key_not_found", "key_id")
    assert key["id"] not in admin.client.get(keys_path(admin)).text


def test_a_key_expires_when_it_was_told_to(admin: Lab, session: Session) -> None:
    key = made(admin, expires_in_seconds=60)
    assert key["expires_at"] == key["created_at"] + 60
    row = session.get_one(ApiKey, key["id"])
    row.expires_at = row.created_at
    session.commit()
    refused(admin.client.get("/v1/files", headers=bearer(key["value"])), 401, "invalid_api_key")


@pytest.mark.parametrize(("verb", "key"), [("GET", ""), ("POST", ""), ("GET", "key_x"), ("DELETE", "key_x")])
def test_a_member_may_not_look_at_keys(lab: Lab, verb: str, key: str) -> None:
    body = {"json": {"name": "mine"}} if verb == "POST" else {}
    error = refused(lab.client.request(verb, keys_path(lab, key), **body), 403, "insufficient_permissions")
    assert "admin key" in error["message"]


def test_a_member_made_over_http_is_a_member_and_an_admin_an_admin(admin: Lab) -> None:
    for role, status in (("member", 403), ("admin", 200)):
        key = made(admin, role=role)
        assert key["role"] == key["owner"]["service_account"]["role"] == role
        assert admin.client.get(keys_path(admin), headers=bearer(key["value"])).status_code == status


@pytest.mark.parametrize(
    ("body", "param"),
    [({"name": ""}, "name"), ({"name": "x", "role": "owner"}, "role"), ({}, "name"),
     ({"name": "x", "expires_in_seconds": 1}, "expires_in_seconds"), ({"name": "x", "scopes": []}, "scopes")],
)  # fmt: skip
def test_a_wrong_key_request_names_the_field(admin: Lab, body: dict[str, Any], param: str) -> None:
    reply = admin.client.post(keys_path(admin), json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_high_priority_needs_an_admin_key(lab: Lab, admin: Lab) -> None:
    body = {"model": MODEL, "training_file": lab.upload()["id"], "priority": "high"}
    refused(lab.client.post(JOBS, json=body), 403, "insufficient_permissions", "priority")
    assert lab.client.get(JOBS).json()["data"] == []
    assert admin.client.post(JOBS, json=body).status_code == 200


def test_a_member_orders_looks_cancels_and_deletes(lab: Lab) -> None:
    job = lab.order()
    assert lab.client.get(f"{JOBS}/{job['id']}").status_code == 200
    assert lab.client.post(f"{JOBS}/{job['id']}/cancel").json()["status"] == "cancelled"
    assert lab.client.delete(f"/v1/files/{job['training_file']}").status_code == 200


def test_openais_client_reads_and_deletes_keys(admin: Lab) -> None:
    key = made(admin)
    client = OpenAI(
        base_url="http://testserver/v1", admin_api_key=admin.secret, api_key=admin.secret, http_client=admin.client
    )
    listed = client.admin.organization.projects.api_keys
    names = [one.name for one in listed.list(admin.project.id, limit=1)]  # two pages
    assert names == ["ci", "test"]
    assert listed.retrieve(key["id"], project_id=admin.project.id).owner.service_account is not None
    assert listed.delete(key["id"], project_id=admin.project.id).deleted
