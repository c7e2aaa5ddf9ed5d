"""One order, one object: keys, retries without keys, and deliberate repetition."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from api.core.access import idempotency, keys
from api.core.db.database import session_scope
from api.core.db.tables import Creation
from api.core.errors import InProgress
from api.errors import respond
from tests.api.conftest import JOBS, JSONL, Lab, Traces, refused
from tests.things import MODEL

AGAIN = {"x-stainless-retry-count": "1", "x-stainless-read-timeout": "600"}


def age(session: Session, **back: float) -> None:
    """Let every remembered creation lie in the past."""
    session.execute(update(Creation).values(created_at=datetime.now(UTC) - timedelta(**back)))
    session.commit()


@pytest.fixture
def body(lab: Lab) -> dict[str, Any]:
    return {"model": MODEL, "training_file": lab.upload()["id"], "seed": 7}


def replayed(reply: Any) -> bool:
    assert reply.status_code == 200, reply.text
    return reply.headers.get("idempotency-replayed") == "true"


def test_a_retried_order_finds_its_job(lab: Lab, body: dict[str, Any]) -> None:
    first, second = lab.client.post(JOBS, json=body), lab.client.post(JOBS, json=body, headers=AGAIN)
    assert not replayed(first) and replayed(second)
    assert first.json()["id"] == second.json()["id"]


def test_a_retry_shows_the_job_as_it_is_now(lab: Lab, body: dict[str, Any]) -> None:
    job = lab.client.post(JOBS, json=body).json()["id"]
    lab.client.post(f"{JOBS}/{job}/cancel")
    assert lab.client.post(JOBS, json=body, headers=AGAIN).json()["status"] == "cancelled"


def test_the_same_order_twice_on_purpose_makes_two_jobs(lab: Lab, body: dict[str, Any]) -> None:
    assert lab.client.post(JOBS, json=body).json()["id"] != lab.client.post(JOBS, json=body).json()["id"]


def test_a_retry_of_another_order_is_a_new_job(lab: Lab, body: dict[str, Any]) -> None:
    lab.client.post(JOBS, json=body)
    assert not replayed(lab.client.post(JOBS, json={**body, "seed": 8}, headers=AGAIN))


def test_a_retry_whose_first_attempt_never_arrived_creates(lab: Lab, body: dict[str, Any]) -> None:
    assert not replayed(lab.client.post(JOBS, json=body, headers=AGAIN))


def test_a_retry_with_another_key_is_not_the_same_caller(lab: Lab, session: Session, body: dict[str, Any]) -> None:
    lab.client.post(JOBS, json=body)
    _, other = keys.create_key(session, lab.project, name="other")
    session.commit()
    assert not replayed(lab.client.post(JOBS, json=body, headers={**AGAIN, "authorization": f"Bearer {other}"}))


@pytest.mark.parametrize(
    ("seconds", "timeout", "found"), [(650, "600", True), (670, "600", False), (890, "9000", True), (70, "1.5", False)]
)
def test_a_retry_counts_within_the_clients_time_out(
    lab: Lab, session: Session, body: dict[str, Any], seconds: int, timeout: str, found: bool
) -> None:
    lab.client.post(JOBS, json=body)
    age(session, seconds=seconds)
    headers = {"x-stainless-retry-count": "2", "x-stainless-read-timeout": timeout}
    assert replayed(lab.client.post(JOBS, json=body, headers=headers)) is found


def test_a_key_makes_one_job_and_answers_the_same_again(lab: Lab, body: dict[str, Any]) -> None:
    key = {"idempotency-key": "abc"}
    first = lab.client.post(JOBS, json=body, headers=key)
    lab.client.post(f"{JOBS}/{first.json()['id']}/cancel")
    second = lab.client.post(JOBS, json=body, headers=key)
    assert replayed(second) and second.json() == first.json()


def test_a_key_for_another_body_is_refused(lab: Lab, body: dict[str, Any], traces: Traces) -> None:
    key = {"idempotency-key": "abc"}
    lab.client.post(JOBS, json=body, headers=key)
    before = traces()
    refused(lab.client.post(JOBS, json={**body, "seed": 8}, headers=key), 400, "idempotency_key_reused")
    assert traces() == before


def test_a_key_is_free_again_after_a_day(lab: Lab, session: Session, body: dict[str, Any]) -> None:
    key = {"idempotency-key": "abc"}
    lab.client.post(JOBS, json=body, headers=key)
    age(session, hours=25)
    assert not replayed(lab.client.post(JOBS, json={**body, "seed": 8}, headers=key))


def test_a_key_belongs_to_one_project(lab: Lab, stranger: Lab) -> None:
    for side in (lab, stranger):
        body = {"model": MODEL, "training_file": side.upload()["id"]}
        assert not replayed(side.client.post(JOBS, json=body, headers={"idempotency-key": "abc"}))


@pytest.mark.parametrize("key", ["", "a" * 256, "ä".encode(), "a\tb"])
def test_a_malformed_key_is_refused(lab: Lab, body: dict[str, Any], key: Any) -> None:
    reply = lab.client.post(JOBS, json=body, headers={"idempotency-key": key})
    refused(reply, 400, "invalid_value", "Idempotency-Key")


def test_a_refused_order_is_not_remembered(lab: Lab, body: dict[str, Any]) -> None:
    key = {"idempotency-key": "abc"}
    assert lab.client.post(JOBS, json={**body, "model": "none"}, headers=key).status_code == 400
    assert not replayed(lab.client.post(JOBS, json=body, headers=key))


def upload(lab: Lab, boundary: str, content: bytes = JSONL, **headers: str) -> Any:
    parts = (
        (
            f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--{boundary}\r\n'
            'Content-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
        ).encode()
        + content
        + f"\r\n--{boundary}--\r\n".encode()
    )
    kind = {"content-type": f"multipart/form-data; boundary={boundary}"}
    return lab.client.post("/v1/files", content=parts, headers={**kind, **headers})


def test_a_retried_upload_with_a_new_boundary_is_one_file(lab: Lab, traces: Traces) -> None:
    first = upload(lab, "one")
    before = traces()
    second = upload(lab, "two", **AGAIN)
    assert replayed(second) and first.json()["id"] == second.json()["id"]
    assert traces() == before


def test_a_retried_upload_of_other_bytes_is_another_file(lab: Lab) -> None:
    upload(lab, "one")
    assert not replayed(upload(lab, "two", JSONL + JSONL, **AGAIN))


def test_an_upload_with_a_key_is_one_file(lab: Lab) -> None:
    first, second = (upload(lab, boundary, **{"idempotency-key": "k"}) for boundary in ("one", "two"))
    assert replayed(second) and first.json() == second.json()
    refused(upload(lab, "three", b"other", **{"idempotency-key": "k"}), 400, "idempotency_key_reused")


def test_a_retry_after_the_file_was_deleted_tells_of_the_first(lab: Lab) -> None:
    file = upload(lab, "one").json()["id"]
    lab.client.delete(f"/v1/files/{file}")
    assert upload(lab, "two", **AGAIN).json()["id"] == file


def test_a_retried_delete_succeeds_for_the_same_key_only(lab: Lab, session: Session) -> None:
    file = lab.upload()["id"]
    lab.client.delete(f"/v1/files/{file}")
    assert lab.client.delete(f"/v1/files/{file}", headers=AGAIN).json()["deleted"] is True
    _, other = keys.create_key(session, lab.project, name="other")
    session.commit()
    reply = lab.client.delete(f"/v1/files/{file}", headers={**AGAIN, "authorization": f"Bearer {other}"})
    refused(reply, 404, "file_not_found", "file_id")


def test_an_order_that_is_still_being_made_is_a_409(service: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On SQLite the second writer waits for the first anyway."""
    monkeypatch.setattr(idempotency, "WAIT_SECONDS", 1)
    attempt = idempotency.RequestIdentity(
        caller=keys.Caller("key_x", "proj_x", "member"),
        path=JOBS,
        key="abc",
        retry_count=0,
        window=timedelta(seconds=60),
    )
    with session_scope() as first, session_scope() as second:
        if first.get_bind().dialect.name == "sqlite":
            return
        idempotency._lock_identity(first, attempt, "mark")
        with pytest.raises(InProgress) as refusal:
            idempotency._lock_identity(second, attempt, "mark")
    reply = respond(refusal.value)
    assert reply.status_code == 409 and reply.headers["retry-after-ms"] == "500"
