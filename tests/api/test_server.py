"""A real server process under several clients at once, and under clients that misbehave."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from sqlalchemy import func, select

from api.core.access import keys
from api.core.db.database import session_scope
from api.core.db.tables import Creation, Event, File, Job
from tests import servers
from tests.api.conftest import JOBS, JSONL, mark
from tests.things import MODEL

BOUNDARY = "B"
HEAD = (
    b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    b'--B\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
)
TAIL = b"\r\n--B--\r\n"
TRIES = 15


class Server:
    """The address of a server, a key for it, and where it keeps its things."""

    def __init__(self, url: str, secret: str, folder: Path) -> None:
        self.address, self.secret, self.folder = urlsplit(url).netloc, secret, folder

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.address, timeout=60)

    def send(
        self, verb: str, path: str, body: bytes | None = None, *, over: Any = None, **headers: str
    ) -> tuple[int, Any, dict[str, str]]:
        """What is answered. After a 503 (a lock took too long on a busy machine) it is asked again, as clients do."""
        for _ in range(TRIES):
            status, content, answered = self._send(verb, path, body, over=over, **headers)
            if status != 503:
                break
            time.sleep(float(answered["retry-after"]))
        return status, content, answered

    def _send(
        self, verb: str, path: str, body: bytes | None, *, over: Any, **headers: str
    ) -> tuple[int, Any, dict[str, str]]:
        connection = over or self.connect()
        given = {"authorization": f"Bearer {self.secret}", "content-type": "application/json"}
        given |= {name.replace("_", "-"): text for name, text in headers.items()}
        connection.request(verb, path, body, given)
        reply = connection.getresponse()
        text = reply.read()
        if over is None:
            connection.close()
        return reply.status, json.loads(text), {name.lower(): value for name, value in reply.getheaders()}

    def upload(self, content: bytes = JSONL, **headers: str) -> str:
        kind = {"content_type": "multipart/form-data; boundary=B"}
        status, file, _ = self.send("POST", "/v1/files", HEAD + content + TAIL, **kind, **headers)
        assert status == 200, file
        return str(file["id"])

    def stored(self) -> int:
        return sum(path.is_file() for path in (self.folder / "storage").rglob("*"))


@pytest.fixture
def server(service: None, tmp_path: Path, database_url: str) -> Iterator[Server]:
    with session_scope() as session:
        project = keys.get_or_create_project(session, "lab")
        _, secret = keys.create_key(session, project, name="test")
        session.commit()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    settings = {"LORAINIT_STATE_DIR": str(tmp_path), "LORAINIT_DATABASE_URL": database_url, "TMPDIR": str(scratch)}
    with servers.web(settings, log=tmp_path / "web.log") as url:
        yield Server(url, secret, tmp_path)


def count(table: Any) -> int:
    with session_scope(read_only=True) as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize("count_of_jobs", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_jobs_from_eight_threads(server: Server, count_of_jobs: int) -> None:
    file = server.upload()
    with session_scope() as session:
        mark(session, file)
    local, opened = threading.local(), []

    def order(number: int) -> tuple[int, str]:
        if not hasattr(local, "connection"):
            local.connection = server.connect()
            opened.append(local.connection)
        body = json.dumps({"model": MODEL, "training_file": file, "seed": number}).encode()
        status, job, _ = server.send("POST", JOBS, body, over=local.connection)
        return status, job.get("id", str(job))

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(order, range(count_of_jobs)))
    for connection in opened:
        connection.close()
    assert {status for status, _ in answers} == {200}
    ids = {job for _, job in answers}
    assert len(ids) == count_of_jobs
    with session_scope(read_only=True) as session:
        assert set(session.scalars(select(Job.id))) == ids
    assert count(Creation) == count_of_jobs + 1
    assert eventually(lambda: count(Event) == 2 * count_of_jobs)  # created, and queued by what runs after the answer


def test_one_key_sent_in_parallel_makes_one_job(server: Server) -> None:
    body = json.dumps({"model": MODEL, "training_file": server.upload()}).encode()

    def order(_: int) -> tuple[int, str, bool]:
        status, job, headers = server.send("POST", JOBS, body, idempotency_key="one")
        return status, job["id"], "idempotency-replayed" in headers

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(order, range(24)))
    assert {status for status, _, _ in answers} == {200}
    assert len({job for _, job, _ in answers}) == 1
    assert [replayed for _, _, replayed in answers].count(False) == 1
    assert count(Job) == 1


def test_one_key_uploaded_in_parallel_makes_one_file(server: Server) -> None:
    with ThreadPoolExecutor(4) as pool:
        ids = set(pool.map(lambda _: server.upload(idempotency_key="one"), range(8)))
    assert len(ids) == 1 and count(File) == 1
    assert eventually(lambda: server.stored() == 1)  # bytes of repetitions go after the answer


def test_a_retry_that_overtakes_its_first_attempt_makes_one_job(server: Server) -> None:
    body = json.dumps({"model": MODEL, "training_file": server.upload()}).encode()
    server.send("POST", JOBS, body)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: server.send("POST", JOBS, body, x_stainless_retry_count="1"), range(8)))
    assert len({job["id"] for _, job, _ in answers}) == 1
    assert count(Job) == 1


def test_an_upload_over_the_limit_is_refused_before_it_is_read(server: Server) -> None:
    size = 600 * 2**20
    connection = server.connect()
    connection.putrequest("POST", "/v1/files")
    connection.putheader("authorization", f"Bearer {server.secret}")
    connection.putheader("content-type", "multipart/form-data; boundary=B")
    connection.putheader("content-length", str(len(HEAD) + size + len(TAIL)))
    connection.endheaders()
    connection.send(HEAD)
    chunk = b"x" * 2**20
    for _ in range(600):  # a client that sends it all before it reads: nothing resets the connection
        connection.send(chunk)
    connection.send(TAIL)
    reply = connection.getresponse()
    error = json.loads(reply.read())["error"]
    connection.close()
    assert (reply.status, error["code"], error["param"]) == (413, "file_too_large", "file")
    assert reply.getheader("x-request-id")
    assert server.stored() == 0 and count(File) == 0


@pytest.mark.parametrize("sent", [0, 100, 3 * 2**20])
def test_an_upload_that_breaks_off_leaves_nothing(server: Server, sent: int) -> None:
    host, port = server.address.split(":")
    with socket.create_connection((host, int(port))) as raw:
        head = (
            f"POST /v1/files HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {server.secret}\r\n"
            f"content-type: multipart/form-data; boundary=B\r\ncontent-length: {10 * 2**20}\r\n\r\n"
        )
        raw.sendall(head.encode() + HEAD + b"x" * sent)
        time.sleep(0.2)
    status, _, _ = server.send("GET", "/v1/files")
    assert status == 200
    log = server.folder / "web.log"
    assert eventually(lambda: '"status": 499' in log.read_text())
    assert "Traceback" not in log.read_text()
    assert count(File) == 0 and count(Creation) == 0 and server.stored() == 0
    assert list((server.folder / "scratch").iterdir()) == []


def test_a_restart_between_an_order_and_its_retry_makes_one_job(
    service: None, tmp_path: Path, database_url: str
) -> None:
    with session_scope() as session:
        project = keys.get_or_create_project(session, "lab")
        _, secret = keys.create_key(session, project, name="test")
        session.commit()
    settings = {"LORAINIT_STATE_DIR": str(tmp_path), "LORAINIT_DATABASE_URL": database_url}
    with servers.web(settings, log=tmp_path / "one.log") as url:
        first = Server(url, secret, tmp_path)
        body = json.dumps({"model": MODEL, "training_file": first.upload()}).encode()
        _, job, _ = first.send("POST", JOBS, body)
    with servers.web(settings, log=tmp_path / "two.log") as url:
        _, again, headers = Server(url, secret, tmp_path).send("POST", JOBS, body, x_stainless_retry_count="1")
    assert again["id"] == job["id"] and headers["idempotency-replayed"] == "true"


def test_secrets_and_ids_never_reach_the_log(server: Server) -> None:
    file = server.upload()
    server.send("GET", f"/v1/files/{file}?after=x")
    log = server.folder / "web.log"
    assert eventually(lambda: "/v1/files/{file_id}" in log.read_text())  # written once the answer has left
    lines = [json.loads(line) for line in log.read_text().splitlines() if '"request"' in line]
    assert {"route", "status", "request_id", "project", "milliseconds"} <= set(lines[-1])
    assert lines[-1]["route"] == "/v1/files/{file_id}"
    assert server.secret not in json.dumps(lines) and file not in json.dumps(lines)
