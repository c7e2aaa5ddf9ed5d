"""A client that costs little beside what it asks: prepared bytes from a few connections, read until they are whole."""

import json
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

THREADS, MIB = 4, 1 << 20


def ask(port: int, requests: Sequence[bytes]) -> tuple[list[float], float]:
    """Seconds of each request, and of all together, from a few connections at once. Anything but 200 ends it."""
    shares = [requests[number::THREADS] for number in range(THREADS)]
    ready = threading.Barrier(THREADS + 1)

    def one(share: Sequence[bytes]) -> list[float]:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            ready.wait()
            return [answer(connection, request) for request in share]

    with ThreadPoolExecutor(THREADS) as pool:
        running = [pool.submit(one, share) for share in shares]
        ready.wait()
        started = time.perf_counter()
        took = [seconds for done in running for seconds in done.result()]
    return took, time.perf_counter() - started


def answer(connection: socket.socket, request: bytes) -> float:
    """Seconds until the whole answer was here."""
    started, held, missing = time.perf_counter(), b"", 1
    connection.sendall(request)
    while missing > 0:
        part = connection.recv(MIB)
        assert part, "the server closed the connection"
        held += part
        head, found, body = held.partition(b"\r\n\r\n")
        if found:
            assert head.startswith(b"HTTP/1.1 200"), held
            length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
            missing = int(length) - len(body)
    return time.perf_counter() - started


def get(path: str, secret: str = "") -> bytes:
    """A request as clients send it."""
    return f"{_head('GET', path, secret)}\r\n".encode()


def post(path: str, secret: str, body: object) -> bytes:
    """The same with a JSON body."""
    content = json.dumps(body).encode()
    head = f"{_head('POST', path, secret)}content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    return head.encode() + content


def _head(verb: str, path: str, secret: str) -> str:
    return (
        f"{verb} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {secret}\r\naccept: application/json\r\n"
    )
