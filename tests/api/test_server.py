"""A real server process under several clients at once, and under clients that misbehave."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from sqlalchemy import Engine, func, select

from api.core.access import keys
from api.core.db.database import session_scope
from api.core.db.tables import Creation, Event, File, Job
from api.core.ids import new_id
from tests import servers
from tests.api.conftest import JOBS, JSONL, mark
from tests.conftest import empty, forget, point_at
from tests.things import MODEL, ON_ONE_DATABASE
from worker import reconciler

BOUNDARY = "B"
HEAD = (
    b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    b'--B\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
)
TAIL = b"\r\n--B--\r\n"
TRIES = 15


class Server:
    """The address of a server, a project and a key of it, and where the server keeps its things."""

    def __init__(self, url: str, project: str, secret: str, folder: Path) -> None:
        self.address, self.project, self.secret, self.folder = urlsplit(url).netloc, project, secret, folder
        self._log = folder / "web.log"
        self._logged_before = self._log.stat().st_size if self._log.exists() else 0
        self._stored_before = self._all_stored()

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.address, timeout=60)

    def send(
        self, verb: str, path: str, body: bytes | None = None, *, over: Any = None, tries: int = TRIES, **headers: str
    ) -> tuple[int, Any, dict[str, str]]:
        """What is answered. After a 503 or a 409 (a lock took too long on a busy machine) it is asked again, as clients
        do; not where a test wants that answer, which has one of `tries`.
        """
        status, content, answered = self._send(verb, path, body, over=over, **headers)
        if status not in (409, 503) or tries == 1:
            return status, content, answered
        time.sleep(0.5 if status == 409 else float(answered["retry-after"]))
        return self.send(verb, path, body, over=over, tries=tries - 1, **headers)

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
        """How many files were stored since this object was made."""
        return len(self._all_stored() - self._stored_before)

    def _all_stored(self) -> set[Path]:
        return {path for path in (self.folder / "storage").rglob("*") if path.is_file()}

    def count(self, table: Any) -> int:
        """How many rows of the project there are."""
        with session_scope(read_only=True) as session:
            rows = select(func.count()).select_from(table)
            return session.scalar(rows.where(table.project_id == self.project)) or 0

    def log(self) -> str:
        """What the server has logged since this object was made."""
        with self._log.open("rb") as file:
            file.seek(self._logged_before)
            return file.read().decode()


@pytest.fixture(scope="module")
def web(database_url: str, engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """One server for all tests of a kind of database: its address and its folder."""
    folder = tmp_path_factory.mktemp("web")
    scratch = folder / "scratch"
    scratch.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        point_at(patch, database_url, folder)
        with servers.web({"TMPDIR": str(scratch)}, log=folder / "web.log") as url:
            yield url, folder
    empty(engine)
    forget()


@pytest.fixture
def server(web: tuple[str, Path]) -> Server:
    """The server as a project of this test's own sees it."""
    url, folder = web
    return Server(url, *a_project_and_a_key(), folder)


def a_project_and_a_key() -> tuple[str, str]:
    """A new project's id, and the secret of its key."""
    with session_scope() as session:
        project = keys.get_or_create_project(session, new_id("lab-", 8))
        _, secret = keys.create_key(session, project, name="test")
        session.commit()
        return project.id, secret


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize("count_of_jobs", [40, pytest.param(1000, marks=pytest.mark.slow)])
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
        assert set(session.scalars(select(Job.id).where(Job.project_id == server.project))) == ids
    assert server.count(Creation) == count_of_jobs + 1
    # Created, and queued once: by what runs after the answer, or by the reconciler if the database was too busy for it.
    reconciler.admit()
    assert eventually(lambda: count_events(ids) == 2 * count_of_jobs)


def count_events(jobs: Iterable[str]) -> int:
    with session_scope(read_only=True) as session:
        return session.scalar(select(func.count()).select_from(Event).where(Event.job_id.in_(jobs))) or 0


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
    assert server.count(Job) == 1


def test_one_key_uploaded_in_parallel_makes_one_file(server: Server) -> None:
    with ThreadPoolExecutor(4) as pool:
        ids = set(pool.map(lambda _: server.upload(idempotency_key="one"), range(8)))
    assert len(ids) == 1 and server.count(File) == 1
    assert eventually(lambda: server.stored() == 1)  # bytes of repetitions go after the answer


def test_a_retry_that_overtakes_its_first_attempt_makes_one_job(server: Server) -> None:
    body = json.dumps({"model": MODEL, "training_file": server.upload()}).encode()
    server.send("POST", JOBS, body)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: server.send("POST", JOBS, body, x_stainless_retry_count="1"), range(8)))
    assert len({job["id"] for _, job, _ in answers}) == 1
    assert server.count(Job) == 1


@ON_ONE_DATABASE
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
    assert server.stored() == 0 and server.count(File) == 0


@ON_ONE_DATABASE
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
    assert eventually(lambda: '"status": 499' in server.log())
    assert "Traceback" not in server.log()
    assert server.count(File) == 0 and server.count(Creation) == 0 and server.stored() == 0
    assert list((server.folder / "scratch").iterdir()) == []


@ON_ONE_DATABASE
def test_a_restart_between_an_order_and_its_retry_makes_one_job(server: Server, tmp_path: Path) -> None:
    body = json.dumps({"model": MODEL, "training_file": server.upload()}).encode()
    _, job, _ = server.send("POST", JOBS, body)
    with servers.web({}, log=tmp_path / "web.log") as url:  # another process, which knows what is in the database
        restarted = Server(url, server.project, server.secret, tmp_path)
        _, again, headers = restarted.send("POST", JOBS, body, x_stainless_retry_count="1")
    assert again["id"] == job["id"] and headers["idempotency-replayed"] == "true"


@ON_ONE_DATABASE
def test_secrets_and_ids_never_reach_the_log(server: Server) -> None:
    file = server.upload()
    server.send("GET", f"/v1/files/{file}?after=x")
    assert eventually(lambda: "/v1/files/{file_id}" in server.log())  # written once the answer has left
    lines = [json.loads(line) for line in server.log().splitlines() if '"request"' in line]
    assert {"route", "status", "request_id", "project", "milliseconds"} <= set(lines[-1])
    assert lines[-1]["route"] == "/v1/files/{file_id}"
    assert server.secret not in json.dumps(lines) and file not in json.dumps(lines)
