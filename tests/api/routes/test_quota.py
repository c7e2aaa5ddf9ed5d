"""How much a project may keep: refused before an upload is read, exact when it is stored."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy.orm import Session

from api.core import settings
from api.core.db import database
from api.core.errors import QuotaExceeded
from api.core.files import quota
from tests.api.conftest import JSONL, Lab, Traces, refused
from tests.things import a_file, a_project


@pytest.fixture
def allowed(environment: pytest.MonkeyPatch, app: object) -> None:
    """Two files and a little more than the bytes of two."""
    environment.setenv("LORAINIT_PROJECT_FILES", "2")
    environment.setenv("LORAINIT_PROJECT_BYTES", str(2 * len(JSONL) + 10))
    settings.get_settings.cache_clear()


def send(lab: Lab, content: bytes = JSONL) -> object:
    return lab.client.post("/v1/files", files={"file": ("a.jsonl", content)}, data={"purpose": "fine-tune"})


def test_a_file_that_does_not_fit_is_refused_with_what_is_used(allowed: None, lab: Lab, traces: Traces) -> None:
    lab.upload()
    before = traces()
    reply = send(lab, JSONL + b"x" * 11)
    error = refused(reply, 429, "quota_exceeded", "file")
    assert f"stores {len(JSONL)} of at most {2 * len(JSONL) + 10} bytes" in error["message"]
    assert (error["type"], reply.headers["x-should-retry"]) == ("insufficient_quota", "false")  # type: ignore[attr-defined]
    assert traces() == before


def test_a_deleted_file_makes_room(allowed: None, lab: Lab) -> None:
    first = lab.upload()["id"]
    lab.upload()
    refused(send(lab), 429, "quota_exceeded", "file")
    lab.client.delete(f"/v1/files/{first}")
    assert lab.upload()["bytes"] == len(JSONL)


def test_the_number_of_files_is_limited_apart_from_their_size(allowed: None, lab: Lab) -> None:
    lab.upload(b"a")
    lab.upload(b"b")
    assert "2 files" in refused(send(lab, b"c"), 429, "quota_exceeded", "file")["message"]


def test_a_large_body_is_refused_by_its_announced_size(
    allowed: None, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    from api.core.files import files

    monkeypatch.setattr(files, "store", None)  # whoever gets that far fails with a 500
    refused(send(lab, b"x" * 200_000), 429, "quota_exceeded", "file")


def test_one_project_cannot_use_up_anothers_room(allowed: None, lab: Lab, stranger: Lab) -> None:
    lab.upload()
    lab.upload()
    assert stranger.upload()["bytes"] == len(JSONL)


def test_a_retried_upload_is_not_counted_twice(allowed: None, lab: Lab) -> None:
    first = lab.upload()
    lab.upload(b"b")
    again = lab.client.post(
        "/v1/files",
        files={"file": ("train.jsonl", JSONL)},
        data={"purpose": "fine-tune"},
        headers={"x-stainless-retry-count": "1"},
    )
    assert (again.status_code, again.json().get("id")) == (200, first["id"]), again.text


def test_results_count_as_bytes_but_not_as_files(allowed: None, lab: Lab, session: Session) -> None:
    a_file(session, lab.project, purpose="fine-tune-results", bytes=2 * len(JSONL))
    quota.reserve_quota(session, lab.project.id, adding=10)
    with pytest.raises(QuotaExceeded):
        quota.reserve_quota(session, lab.project.id, adding=11)


def test_uploads_at_the_same_time_are_counted_one_after_another(service: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAINIT_PROJECT_FILES", "3")
    settings.get_settings.cache_clear()
    with database.session_scope() as session:
        project = a_project(session)
        session.commit()

    def add(_: int) -> bool:
        with database.session_scope() as session:
            try:
                quota.reserve_quota(session, project.id, adding=1)
            except QuotaExceeded:
                return False
            a_file(session, project)
            time.sleep(0.05)
            session.commit()
            return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(add, range(8))) == 3
