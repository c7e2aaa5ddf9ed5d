"""Files: what is stored, listed, read in parts and deleted."""

import hashlib
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from obstore.exceptions import GenericError
from sqlalchemy import select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from starlette.formparsers import MultiPartParser

from api.core.db.tables import File
from api.core.files import files
from api.core.files.storage import get_storage
from api.core.settings import get_settings
from tests.api.conftest import JOBS, JSONL, Lab, Traces, mark, refused

pytestmark = pytest.mark.one_database
FIELDS = {
    "id", "object", "bytes", "created_at", "expires_at", "filename", "purpose", "status", "status_details", "sha256",
    "validation",
}  # fmt: skip


def test_an_upload_has_every_field_and_is_not_checked_yet(lab: Lab) -> None:
    file = lab.upload()
    assert set(file) == FIELDS
    assert file["status"] == "uploaded" and file["validation"] is None
    assert file["bytes"] == len(JSONL) and file["sha256"] == hashlib.sha256(JSONL).hexdigest()


def test_a_large_upload_goes_through_a_temporary_file(lab: Lab) -> None:
    content = b"x" * (3 * 2**20)
    file = lab.upload(content)
    assert lab.client.get(f"/v1/files/{file['id']}/content").content == content


@pytest.mark.parametrize(
    ("given", "kept"), [("../../etc/passwd", "passwd"), ("C:\\data\\a.jsonl", "a.jsonl"), ("ä.jsonl", "ä.jsonl")]
)
def test_a_file_name_keeps_no_path(lab: Lab, given: str, kept: str) -> None:
    reply = lab.client.post("/v1/files", files={"file": (given, JSONL)}, data={"purpose": "fine-tune"})
    assert reply.json()["filename"] == kept


def test_a_file_of_another_purpose_is_stored_as_it_is(lab: Lab) -> None:
    assert lab.upload(b"anything", purpose="user_data")["status"] == "processed"


def test_an_expiry_is_kept(lab: Lab) -> None:
    file = lab.upload(**{"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"})
    assert file["expires_at"] == file["created_at"] + 3600


def test_an_expired_file_cannot_be_read_or_trained_on(lab: Lab, session: Session) -> None:
    file = lab.upload()["id"]
    mark(session, file, expires_at=datetime.now(UTC) - timedelta(seconds=1))
    refused(lab.client.get(f"/v1/files/{file}/content"), 404, "file_not_found", "file_id")
    reply = lab.client.post(JOBS, json={"model": "smollm2-135m-instruct", "training_file": file})
    refused(reply, 400, "file_expired", "training_file")


def test_a_failing_row_takes_its_bytes_back(lab: Lab, traces: Traces, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no row today")

    monkeypatch.setattr(files, "add", broken)
    before = traces()
    reply = lab.client.post("/v1/files", files={"file": ("a.jsonl", JSONL)}, data={"purpose": "fine-tune"})
    refused(reply, 500, "internal_error")
    assert traces() == before


def test_a_full_disk_is_a_429_that_is_not_retried(lab: Lab, traces: Traces, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(get_storage(), "put", full)
    before = traces()
    reply = lab.client.post("/v1/files", files={"file": ("a.jsonl", JSONL)}, data={"purpose": "fine-tune"})
    refused(reply, 429, "insufficient_storage")
    assert reply.headers["x-should-retry"] == "false"
    assert traces() == before


def test_storage_that_cannot_be_written_to_is_a_503(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise GenericError("Unable to open file: Read-only file system (os error 30)")

    monkeypatch.setattr(get_storage(), "put", refuse)
    monkeypatch.setattr(get_storage(), "delete", refuse)
    reply = lab.client.post("/v1/files", files={"file": ("a.jsonl", JSONL)}, data={"purpose": "fine-tune"})
    refused(reply, 503, "not_ready")


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OperationalError("INSERT", {}, sqlite3.OperationalError("database or disk is full")),
    ],
)
def test_a_full_disk_anywhere_on_the_way_is_the_same_refusal(
    lab: Lab, traces: Traces, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    before = traces()
    # The spool of the body, or the database once the bytes are stored.
    monkeypatch.setattr(*(MultiPartParser, "parse") if isinstance(error, OSError) else (files, "add"), full)
    reply = lab.client.post("/v1/files", files={"file": ("a.jsonl", JSONL)}, data={"purpose": "fine-tune"})
    refused(reply, 429, "insufficient_storage")
    assert reply.headers["x-should-retry"] == "false"
    assert traces() == before


def test_an_upload_that_would_leave_less_than_the_floor_is_refused(
    lab: Lab, traces: Traces, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("LORAINIT_MIN_FREE_BYTES", str(2**62))
    get_settings.cache_clear()
    before = traces()
    reply = lab.client.post("/v1/files", files={"file": ("a.jsonl", JSONL)}, data={"purpose": "fine-tune"})
    refused(reply, 429, "insufficient_storage")
    assert traces() == before


def test_pages_follow_each_other_without_gap_or_repeat(lab: Lab) -> None:
    ids = [lab.upload(b"%d" % n, purpose="evals")["id"] for n in range(7)]
    seen, after = [], ""
    while True:
        page = lab.client.get(f"/v1/files?limit=3&after={after}").json()
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
        seen += [file["id"] for file in page["data"]]
        after = page["last_id"]
        lab.client.delete(f"/v1/files/{after}")  # the cursor itself goes away
        lab.upload(b"new", purpose="evals")
        if not page["has_more"]:
            break
    assert seen == ids[::-1]


def test_a_page_of_files_in_which_much_is_wrong_ends_early(lab: Lab, session: Session) -> None:
    """Ten thousand files with twenty long faults each would be half a gigabyte of one answer."""
    problem = {"line": 1, "code": "unknown_key", "param": "x", "message": "x" * 500}
    report = {"kind": None, "rows": 20, "errors": [problem] * 20, "warnings": []}
    ids = [lab.upload(b"%d" % n, purpose="evals")["id"] for n in range(5)]
    for file in session.scalars(select(File)):
        file.validation = report
    session.commit()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "PAGE_PROBLEMS", 45)
        first = lab.client.get("/v1/files?order=asc").json()
        rest = lab.client.get(f"/v1/files?order=asc&after={first['last_id']}&limit=2").json()
        patch.setattr(files, "PAGE_PROBLEMS", 5)
        one = lab.client.get("/v1/files?order=asc").json()
    assert ([file["id"] for file in first["data"]], first["has_more"]) == (ids[:2], True)
    assert ([file["id"] for file in rest["data"]], rest["has_more"]) == (ids[2:4], True)
    assert ([file["id"] for file in one["data"]], one["has_more"]) == (ids[:1], True)


def test_files_are_listed_in_either_order_and_by_purpose(lab: Lab) -> None:
    first, second, third = (lab.upload(purpose=purpose)["id"] for purpose in ("evals", "fine-tune", "evals"))
    listed = lab.client.get("/v1/files?purpose=evals&order=asc").json()
    assert [file["id"] for file in listed["data"]] == [first, third]
    assert [file["id"] for file in lab.client.get("/v1/files").json()["data"]] == [third, second, first]


def test_an_empty_list_has_the_whole_envelope(lab: Lab) -> None:
    empty = {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    assert lab.client.get("/v1/files").json() == empty


def test_a_deleted_file_is_gone_with_its_bytes(lab: Lab, traces: Traces) -> None:
    file = lab.upload()["id"]
    assert lab.client.delete(f"/v1/files/{file}").json() == {"id": file, "object": "file", "deleted": True}
    assert traces()["stored"] == 0
    for reply in (lab.client.delete(f"/v1/files/{file}"), lab.client.get(f"/v1/files/{file}")):
        refused(reply, 404, "file_not_found", "file_id")


def test_a_file_of_an_open_job_cannot_be_deleted(lab: Lab) -> None:
    job = lab.order()
    error = refused(lab.client.delete(f"/v1/files/{job['training_file']}"), 400, "file_in_use", "file_id")
    assert job["id"] in error["message"]
    lab.client.post(f"{JOBS}/{job['id']}/cancel")
    assert lab.client.delete(f"/v1/files/{job['training_file']}").status_code == 200


# --- bytes -------------------------------------------------------------------------------------


@pytest.fixture
def url(lab: Lab) -> str:
    return f"/v1/files/{lab.upload(b'0123456789')['id']}/content"


def test_the_content_is_exactly_the_upload(lab: Lab, url: str) -> None:
    reply = lab.client.get(url, headers={"accept-encoding": "gzip", "accept": "application/binary"})
    assert reply.content == b"0123456789"
    assert reply.headers["etag"] == f'"{hashlib.sha256(reply.content).hexdigest()}"'
    assert reply.headers["content-length"] == "10"
    assert reply.headers["accept-ranges"] == "bytes"
    assert reply.headers["content-type"] == "application/octet-stream"
    assert "content-encoding" not in reply.headers


def test_head_has_the_same_headers_and_no_body(lab: Lab, url: str) -> None:
    get, head = lab.client.get(url), lab.client.head(url)
    assert head.content == b"" and head.status_code == 200
    for name in ("etag", "content-length", "content-type", "accept-ranges"):
        assert head.headers[name] == get.headers[name]


@pytest.mark.parametrize(
    ("asked", "got", "where"),
    [
        ("0-3", b"0123", "0-3"),
        ("5-", b"56789", "5-9"),
        ("-3", b"789", "7-9"),
        ("8-99", b"89", "8-9"),
        ("-99", b"0123456789", "0-9"),
    ],
)
def test_one_range_is_a_206(lab: Lab, url: str, asked: str, got: bytes, where: str) -> None:
    reply = lab.client.get(url, headers={"range": f"bytes={asked}"})
    assert (reply.status_code, reply.content) == (206, got)
    assert reply.headers["content-range"] == f"bytes {where}/10"
    assert reply.headers["content-length"] == str(len(got))


@pytest.mark.parametrize("asked", ["bytes=0-1,3-4", "bytes=5-2", "bytes=-", "lines=1-2", "bytes=x"])
def test_a_range_we_do_not_serve_is_everything(lab: Lab, url: str, asked: str) -> None:
    reply = lab.client.get(url, headers={"range": asked})
    assert (reply.status_code, len(reply.content)) == (200, 10)


@pytest.mark.parametrize("asked", ["bytes=10-", "bytes=-0", "bytes=99-100"])
def test_a_range_outside_is_a_416(lab: Lab, url: str, asked: str) -> None:
    reply = lab.client.get(url, headers={"range": asked})
    refused(reply, 416, "range_not_satisfiable", "Range")
    assert reply.headers["content-range"] == "bytes */10"


def test_conditions_are_honoured(lab: Lab, url: str) -> None:
    etag = lab.client.head(url).headers["etag"]
    unchanged = lab.client.get(url, headers={"if-none-match": etag})
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    assert lab.client.get(url, headers={"if-none-match": '"other"'}).status_code == 200
    ranged = {"range": "bytes=0-3"}
    assert lab.client.get(url, headers={**ranged, "if-range": etag}).status_code == 206
    assert lab.client.get(url, headers={**ranged, "if-range": '"old"'}).status_code == 200


def test_an_empty_file_can_be_read(lab: Lab) -> None:
    reply = lab.client.get(f"/v1/files/{lab.upload(b'')['id']}/content")
    assert (reply.status_code, reply.content) == (200, b"")


def test_missing_bytes_are_a_404_and_not_half_an_answer(lab: Lab, session: Session, tmp_path: Path) -> None:
    file = lab.upload()["id"]
    get_storage().delete(session.get_one(File, file).storage_key)
    refused(lab.client.get(f"/v1/files/{file}/content"), 404, "file_not_found", "file_id")
