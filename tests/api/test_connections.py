"""Connections that say nothing, too little or too much, against a real server: they are closed, and others go on."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from api.core.access import keys
from api.core.db import database as db
from api.core.db import migrate
from api.core.settings import BadSettings, get_settings
from api.http.concurrency import find_network
from tests import servers
from tests.api.conftest import JOBS
from tests.api.test_hangs import a_lab, ask, everything
from tests.api.test_server import Server, eventually
from tests.promises import within

HEAD = "POST /v1/fine_tuning/jobs HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
STRICT = {"head_seconds": 0.5, "keep_alive_seconds": 1, "max_head_bytes": 4096, "connections": 40,
          "requests_at_once": 5, "address_at_once": 3, "key_at_once": 2}  # fmt: skip


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """A server with little patience, as two projects see it. Nothing here is a matter of the database: it is SQLite."""
    with limited(tmp_path_factory.mktemp("strict"), **STRICT) as seen:
        yield seen


@pytest.fixture
def server(strict: tuple[Server, Server]) -> Server:
    return strict[0]


@contextmanager
def limited(folder: Path, **settings: object) -> Iterator[tuple[Server, Server]]:
    """A server with these settings, as two projects see it."""
    database = f"sqlite:///{folder}/test.db"
    environment = {f"LORAINIT_{name.upper()}": str(value) for name, value in settings.items()}
    environment |= {"LORAINIT_STATE_DIR": str(folder), "LORAINIT_DATABASE_URL": database}
    one, two = two_keys(database)
    with servers.web(environment, log=folder / "web.log") as url:
        yield Server(url, *one, folder), Server(url, *two, folder)


def two_keys(database: str) -> list[tuple[str, str]]:
    """Of two projects: each one's id, and the secret of its key."""
    engine = db.make_engine(database)
    migrate.upgrade(engine)
    with Session(engine) as session:
        projects = [keys.get_or_create_project(session, name) for name in ("one", "two")]
        made = [(project.id, keys.create_key(session, project, name="test")[1]) for project in projects]
        session.commit()
    engine.dispose()
    return made


@contextmanager
def connected(server: Server, *sent: bytes, source: str = "127.0.0.1") -> Iterator[socket.socket]:
    host, port = server.address.split(":")
    with socket.create_connection((host, int(port)), timeout=20, source_address=(source, 0)) as raw:
        for part in sent:
            raw.sendall(part)
        yield raw


def all_of(raw: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    received = b""
    while chunk := raw.recv(1 << 16):
        received += chunk
    return received


def refusal(raw: socket.socket) -> tuple[int, str]:
    head, _, body = all_of(raw).partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower() and b"content-type: application/json" in head.lower()
    error = json.loads(body)["error"]
    assert error["message"].endswith(".") and error["type"] == "invalid_request_error"
    return int(head.split()[1]), error["code"]


def get(path: str = "/healthz", *headers: str) -> bytes:
    return "\r\n".join((f"GET {path} HTTP/1.1", "host: x", *headers, "", "")).encode()


def status(raw: socket.socket) -> int:
    return int(raw.recv(1 << 16).split()[1])


# --- time ---------------------------------------------------------------------------------------------------


def test_a_connection_that_says_nothing_is_closed(server: Server) -> None:
    with connected(server) as raw:
        assert all_of(raw) == b""


def test_a_head_that_stops_is_refused_in_our_shape(server: Server) -> None:
    with connected(server, b"GET /healthz HTTP/1.1\r\nhost") as raw:
        assert refusal(raw) == (400, "head_too_slow")


def test_a_head_that_drips_is_refused_too(server: Server) -> None:
    with connected(server, b"GET /healthz HTTP/1.1\r\nx: ") as raw:
        raw.setblocking(False)
        received = b""
        for _ in range(200):
            time.sleep(0.05)
            raw.send(b"x")
            try:
                received = raw.recv(1 << 16)
            except BlockingIOError:
                continue
            break
        assert b"head_too_slow" in received


def test_the_head_of_a_second_request_has_no_more_time(server: Server) -> None:
    with connected(server, get()) as raw:
        assert status(raw) == 200
        raw.sendall(b"G")
        assert refusal(raw) == (400, "head_too_slow")


def test_a_connection_that_asks_nothing_more_is_closed(server: Server) -> None:
    with connected(server, get()) as raw:
        begun = time.monotonic()
        assert all_of(raw).endswith(b'{"status":"ok"}')
        assert time.monotonic() - begun < within(4)


def test_a_refused_body_that_drips_does_not_keep_its_connection(server: Server) -> None:
    with connected(server, f"{HEAD}content-length: 100000000\r\n\r\n".encode()) as raw:
        assert status(raw) == 413
        with pytest.raises(OSError, match=r"Broken pipe|reset"):
            drip(raw)


def drip(raw: socket.socket) -> None:
    """Go on sending for ten seconds, or until the connection is closed."""
    for _ in range(200):
        raw.sendall(b"x")
        time.sleep(0.05)


# --- size ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [b"GET /", b"GET / HTTP/1.1\r\nx: "], ids=["path", "header"])
def test_a_head_without_end_is_refused(server: Server, start: bytes) -> None:
    with connected(server, start + 5000 * b"x") as raw:
        assert refusal(raw) == (431, "head_too_large")


def test_trailers_without_end_are_refused(server: Server) -> None:
    sent = f"{HEAD}transfer-encoding: chunked\r\n\r\n2\r\n{{}}\r\n0\r\n".encode()
    with connected(server, sent) as raw:
        time.sleep(0.1)
        for _ in range(20):
            raw.sendall(b"x-more: " + 1000 * b"x" + b"\r\n")
        assert refusal(raw) == (431, "head_too_large")


@pytest.mark.parametrize("sent", [b"\x16\x03\x01\x02\x00", b"GET / HTTP/9.9\r\n\r\n"], ids=["TLS", "another version"])
def test_what_is_not_http_is_refused_in_our_shape(server: Server, sent: bytes) -> None:
    with connected(server, sent) as raw:
        assert refusal(raw) == (400, "malformed_request")


def test_a_body_that_is_not_http_is_refused_in_our_shape(server: Server) -> None:
    with connected(server, f"{HEAD}transfer-encoding: chunked\r\n\r\n".encode()) as raw:
        raw.sendall(b"no number\r\n")
        assert refusal(raw) == (400, "malformed_request")


def test_a_few_requests_sent_at_once_are_answered_in_order(server: Server) -> None:
    wanted = [get("/healthz"), get("/nowhere")] * 5
    with connected(server, b"".join(wanted)) as raw:
        answers = all_of(raw)
    assert [int(part[:3]) for part in answers.split(b"HTTP/1.1 ")[1:]] == [200, 404] * 5


def test_thousands_of_requests_sent_at_once_are_not_kept(server: Server) -> None:
    with connected(server, get() * 3000) as raw:
        received = b""
        with suppress(ConnectionResetError):
            received = all_of(raw)
    assert received.count(b"HTTP/1.1 200") < 100


# --- number -------------------------------------------------------------------------------------------------


def test_a_crowd_that_says_nothing_keeps_nobody_out(tmp_path: Path) -> None:
    with limited(tmp_path) as (server, _), ExitStack() as crowd:
        for _ in range(1100):  # more than LORAINIT_CONNECTIONS
            crowd.enter_context(connected(server))
        for path in ("/healthz", "/v1/files"):
            assert server.send("GET", path)[0] == 200


def test_a_connection_from_elsewhere_is_not_closed_for_the_crowds(tmp_path: Path) -> None:
    with limited(tmp_path, connections=8, requests_at_once=4) as (server, _), ExitStack() as crowd:
        other = crowd.enter_context(connected(server, source="127.0.0.2"))
        for _ in range(20):
            crowd.enter_context(connected(server))
        other.sendall(get())
        assert status(other) == 200


def begin(crowd: ExitStack, server: Server, count: int, *headers: str) -> None:
    """Requests that are under way for as long as their bodies do not come."""
    head = "\r\n".join(("expect: 100-continue", "content-length: 10", *headers, "", ""))
    for _ in range(count):
        raw = crowd.enter_context(connected(server, f"{HEAD}{head}".encode()))
        assert raw.recv(100).startswith(b"HTTP/1.1 100")


def test_who_comes_when_all_places_are_taken_is_told_so_and_health_is_served(server: Server) -> None:
    with ExitStack() as crowd:
        begin(crowd, server, 3, "x-forwarded-for: 10.0.0.1")
        begin(crowd, server, 2, "x-forwarded-for: 10.0.0.2")
        code, answer, headers = server.send("GET", "/v1/files", tries=1)
        assert (code, answer["error"]["code"], answer["error"]["type"]) == (503, "overloaded", "server_error")
        assert headers["retry-after"] and headers["x-request-id"]
        assert server.send("GET", "/healthz")[0] == 200
        assert server.send("GET", "/readyz", tries=1)[0] in (200, 503)
    assert eventually(lambda: server.send("GET", "/v1/files")[0] == 200)


def test_one_address_does_not_take_all_places(server: Server) -> None:
    with ExitStack() as crowd:
        begin(crowd, server, 3, "x-forwarded-for: 10.0.0.1")
        code, answer, headers = server.send("GET", "/v1/files", x_forwarded_for="10.0.0.1")
        assert (code, answer["error"]["code"]) == (429, "rate_limit_exceeded")
        assert headers["retry-after"] == "1"
        assert server.send("GET", "/healthz", x_forwarded_for="10.0.0.1")[0] == 200
        assert server.send("GET", "/v1/files", x_forwarded_for="10.0.0.2")[0] == 200
    assert eventually(lambda: server.send("GET", "/v1/files", x_forwarded_for="10.0.0.1")[0] == 200)


def test_one_key_does_not_take_all_places(strict: tuple[Server, Server]) -> None:
    server, others = strict
    file = server.upload(b'{"a": "' + b"x" * 2**23 + b'"}')
    wanted = get(f"/v1/files/{file}/content", f"authorization: Bearer {server.secret}")
    with ExitStack() as crowd:
        for _ in range(2):
            assert crowd.enter_context(connected(server, wanted)).recv(1)  # and reads nothing more
        code, answer, _ = server.send("GET", JOBS)
        assert (code, answer["error"]["code"]) == (429, "rate_limit_exceeded")
        assert "API key" in answer["error"]["message"]
        assert others.send("GET", JOBS)[0] == 200
    assert eventually(lambda: server.send("GET", JOBS)[0] == 200)


def test_every_route_takes_one_permit_and_gives_it_back(service: None, environment: pytest.MonkeyPatch) -> None:
    for name in ("REQUESTS", "ADDRESS", "KEY"):
        environment.setenv(f"LORAINIT_{name}_AT_ONCE", "1")
    get_settings.cache_clear()
    lab = a_lab("admin")
    for verb, path in everything(lab):
        assert ask(lab, verb, path).status_code in (200, 401), (verb, path)  # 401: /metrics is for this host alone


@pytest.mark.parametrize(
    ("client", "counted"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("2001:db8:0:1:aaaa::1", "2001:db8:0:1::"),
        ("2001:db8:0:1:bbbb::2", "2001:db8:0:1::"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("somewhere", "somewhere"),
    ],
)
def test_a_host_counts_once_however_many_addresses_its_network_has(client: str, counted: str) -> None:
    assert find_network((client, 1)) == counted


def test_fewer_connections_than_requests_are_refused(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("LORAINIT_CONNECTIONS", "100")
    get_settings.cache_clear()
    with pytest.raises(BadSettings, match="LORAINIT_REQUESTS_AT_ONCE: must be less than LORAINIT_CONNECTIONS"):
        get_settings()
