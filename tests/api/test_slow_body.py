"""Bodies that do not arrive, against a real server: one caller's slowness holds nothing up for long."""

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.api.conftest import JOBS, JSONL
from tests.api.test_connections import limited
from tests.api.test_server import HEAD, TAIL, Server
from tests.promises import within

PATIENCE = 0.5


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Nothing here is a matter of the database: it is SQLite."""
    with limited(tmp_path_factory.mktemp("slow"), body_seconds=PATIENCE) as (server, _):
        yield server


def begin(server: Server, path: str, kind: str, size: int) -> socket.socket:
    host, port = server.address.split(":")
    raw = socket.create_connection((host, int(port)), timeout=10)
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {server.secret}\r\n"
        f"content-type: {kind}\r\ncontent-length: {size}\r\n\r\n"
    )
    raw.sendall(head.encode())
    return raw


def answer(raw: socket.socket) -> tuple[int, dict[str, Any]]:
    """The whole answer; ends because the server closes the connection."""
    received = b""
    while chunk := raw.recv(1 << 16):
        received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    return int(head.split()[1]), json.loads(body)["error"]


@pytest.mark.parametrize(
    ("path", "kind", "start"),
    [("/v1/files", "multipart/form-data; boundary=B", HEAD), (JOBS, "application/json", b'{"model": ')],
)
def test_a_body_that_stops_is_refused_and_its_connection_closed(
    server: Server, path: str, kind: str, start: bytes
) -> None:
    with begin(server, path, kind, 1000) as raw:
        raw.sendall(start)
        begun = time.monotonic()
        status, error = answer(raw)
    assert (status, error["code"]) == (400, "body_too_slow")
    assert f"{len(start)} bytes" in error["message"]
    assert PATIENCE * 0.8 < time.monotonic() - begun < within(PATIENCE + 5)
    assert server.stored() == 0


def test_a_body_that_drips_is_refused_too(server: Server) -> None:
    with begin(server, "/v1/files", "multipart/form-data; boundary=B", 10_000) as raw:
        raw.sendall(HEAD)
        begun = time.monotonic()
        for _ in range(100):
            time.sleep(0.05)
            try:
                raw.sendall(b"x")
            except OSError:
                break
            if time.monotonic() - begun > PATIENCE * 6:
                break
        raw.setblocking(False)
        assert b"body_too_slow" in raw.recv(1 << 16)


def test_a_slow_body_at_a_fair_pace_is_taken(server: Server) -> None:
    content = JSONL + b" " * 60_000
    whole = HEAD + content + TAIL
    with begin(server, "/v1/files", "multipart/form-data; boundary=B", len(whole)) as raw:
        for offset in range(0, len(whole), 10_000):  # 50 kB/s: longer than the patience in all, above the pace
            raw.sendall(whole[offset : offset + 10_000])
            time.sleep(0.2)
        assert raw.recv(1 << 16).startswith(b"HTTP/1.1 200")
