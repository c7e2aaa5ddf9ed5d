"""The API benchmark's page says what was measured; its client takes answers as they come, and nothing but successes."""

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from benchmarks.api_client import THREADS, ask, get, post
from benchmarks.api_page import BARE, LIST, POLL, Cost, Found, Whole, page

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


def found(*, poll: float, seconds: float) -> Found:
    wall = seconds * 100
    costs = {name: Cost(cpu, [seconds] * 100, wall) for name, cpu in ((BARE, 0.5), (POLL, poll), (LIST, 9.0))}
    return Found("sqlite", costs, Whole(1000, 1.5, 0.2, 0.1, 7.6))


def test_the_page_shows_costs_as_multiples_of_the_bare_route() -> None:
    text = page([found(poll=1.25, seconds=0.0005)], busy=(1.0, 2.0))
    assert f"| {POLL} | sqlite | 1.25 | 2.5 | 2000 | 0.5 | 0.5 |" in text
    assert "| 1000 adapters | sqlite | 1.5 | 0.2 | 0.1 | 8 |" in text
    assert "not held" not in text


def test_a_goal_that_was_missed_is_said() -> None:
    text = page([found(poll=1.6, seconds=0.002)], busy=(1.0, 2.0))
    assert text.count("not held in this run") == 2


@contextmanager
def answering(parts: Sequence[bytes]) -> Iterator[tuple[int, list[bytes]]]:
    """A server that answers every request in these parts; its port, and what it was sent."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for _ in range(THREADS):
                connection, _address = listener.accept()
                threading.Thread(target=talk, args=(connection,), daemon=True).start()

        def talk(connection: socket.socket) -> None:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with connection:
                while request := connection.recv(65536):
                    asked.append(request)
                    for part in parts:
                        connection.sendall(part)

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1], asked


@pytest.mark.parametrize("cut", [1, 17, 40, len(OK) - 1])
def test_an_answer_in_pieces_is_waited_for(cut: int) -> None:
    requests = [get("/a", "key"), post("/b", "key", {"c": 1})] * THREADS
    with answering([OK[:cut], OK[cut:]]) as (port, asked):
        took, wall = ask(port, requests)
    assert len(took) == len(requests) and 0 < max(took) <= wall + 0.1
    assert sorted(asked) == sorted(requests)


def test_an_answer_that_is_no_success_ends_it() -> None:
    with answering([OK.replace(b"200 OK", b"401 no")]) as (port, _), pytest.raises(AssertionError, match="401"):
        ask(port, [get("/a")] * THREADS)
