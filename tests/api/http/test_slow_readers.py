"""Clients that order much and read little, against a real server: each costs little, who reads nothing is let go."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
from sqlalchemy.orm import Session

from api.core.access import keys
from api.core.db import database
from api.core.jobs import events
from api.http.download_memory import LARGE, SMALL, DownloadMemory, next_block_size
from tests.api.conftest import JOBS
from tests.api.test_connections import limited
from tests.api.test_server import Server, eventually
from tests.things import a_running_job

PATIENCE = 2  # seconds for which a client may take nothing
MIB = 2**20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with limited(tmp_path_factory.mktemp("slow"), stall_seconds=PATIENCE, download_bytes=16 * MIB) as (server, _):
        yield server


@pytest.fixture(scope="module")
def content() -> bytes:
    return b'{"a": "' + os.urandom(15 * MIB).hex().encode() + b'"}\n'


@pytest.fixture(scope="module")
def file(server: Server, content: bytes) -> str:
    return server.upload(content)


@pytest.fixture(scope="module")
def job(server: Server) -> str:
    """A job with a megabyte of events."""
    engine = database.make_engine(f"sqlite:///{server.folder}/test.db")
    with Session(engine) as session:
        job, _ = a_running_job(session, keys.get_or_create_project(session, "one"))
        for number in range(400):
            events.append(session, job.id, f"{number} {'x' * 3000}", at=database.now(session))
        name = job.id
        session.commit()
    engine.dispose()
    return name


@contextmanager
def ordered(server: Server, path: str, *, window: int | None = None) -> Iterator[socket.socket]:
    """A request whose answer is not read. `window`: bytes for which this side has room."""
    host, port = server.address.split(":")
    with socket.socket() as raw:
        raw.settimeout(30)
        if window is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        raw.connect((host, int(port)))
        raw.sendall(asking(server, path))
        yield raw


def asking(server: Server, path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {server.secret}\r\n\r\n".encode()


def process(server: Server) -> psutil.Process:
    """That of the server."""
    port = int(server.address.split(":")[1])
    ours = [one for one in psutil.Process().children() if "api.server" in one.cmdline()]
    (found,) = (one for one in ours if any(c.laddr.port == port for c in one.net_connections()))
    return found


def open_connections(server: Server) -> int:
    return sum(one.status == psutil.CONN_ESTABLISHED for one in process(server).net_connections())


def unsent(server: Server) -> int:
    """Bytes that the kernel holds for the server's clients."""
    local = f"{int(server.address.split(':')[1]):04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(int(row[4].partition(":")[0], 16) for row in rows if row[1].endswith(f":{local}"))


def settled(server: Server) -> int:
    """Resident bytes of the server, once it does nothing any more."""
    one, before = process(server), -1.0
    while (spent := sum(one.cpu_times()[:2])) != before:
        before = spent
        time.sleep(0.5)
    return int(one.memory_info().rss)


def cost_of_a_crowd(server: Server, file: str, count: int) -> tuple[int, int]:
    """Bytes of memory that clients who order a file and read nothing take from the server and from its kernel."""
    before = settled(server)
    with ExitStack() as crowd:
        for _ in range(count):
            crowd.enter_context(ordered(server, f"/v1/files/{file}/content"))
        after = settled(server)
        assert open_connections(server) >= count
        return after - before, unsent(server)


def test_forty_who_read_nothing_cost_little(tmp_path: Path, content: bytes) -> None:
    with limited(tmp_path, download_bytes=16 * MIB) as (server, _):
        held, in_kernel = cost_of_a_crowd(server, server.upload(content), 40)
    assert held < 80 * MIB, "17 MiB each before there were limits"
    assert in_kernel < 40 * 300 * 1024


@pytest.mark.slow
def test_three_hundred_who_read_nothing_cost_little(tmp_path: Path, content: bytes) -> None:
    with limited(tmp_path, address_at_once=400, key_at_once=400) as (server, _):
        held, in_kernel = cost_of_a_crowd(server, server.upload(content), 300)
        print(f"300 clients: {held / MIB:.0f} MiB held by the server, {in_kernel / MIB:.0f} by its kernel")
    assert held < 300 * MIB, "5.1 GiB before there were limits"


def test_who_reads_nothing_is_let_go(server: Server, file: str) -> None:
    with ordered(server, f"/v1/files/{file}/content", window=65536):
        assert eventually(lambda: open_connections(server) == 1)
        assert eventually(lambda: open_connections(server) == 0)


def test_who_stops_reading_is_let_go(server: Server, file: str) -> None:
    with ordered(server, f"/v1/files/{file}/content", window=65536) as raw:
        taken = 0
        while taken < 4 * MIB:
            taken += len(raw.recv(65536))
        assert eventually(lambda: open_connections(server) == 0)


def test_who_reads_slowly_gets_it_all(server: Server, file: str, content: bytes) -> None:
    begun, received = time.monotonic(), bytearray()
    with ordered(server, f"/v1/files/{file}/content", window=65536) as raw:
        while not received.endswith(content[-3:]):  # which it holds nowhere else
            piece = raw.recv(MIB)
            assert piece, f"cut off after {len(received)} bytes"
            received += piece
            if time.monotonic() - begun < 2 * PATIENCE:
                time.sleep(0.1)
    assert received.endswith(content)
    assert time.monotonic() - begun > 2 * PATIENCE


def test_who_reads_nothing_of_a_stream_is_let_go(server: Server, job: str) -> None:
    with ordered(server, f"{JOBS}/{job}/events/stream", window=4096):
        assert eventually(lambda: open_connections(server) == 1)
        assert eventually(lambda: open_connections(server) == 0)


def test_who_reads_nothing_of_long_answers_is_let_go(server: Server, job: str) -> None:
    path = f"{JOBS}/{job}/events?limit=1000"
    with ordered(server, path, window=4096) as raw:
        for _ in range(7):
            raw.sendall(asking(server, path))
        assert eventually(lambda: open_connections(server) == 1)
        assert eventually(lambda: open_connections(server) == 0)


# --- blocks -------------------------------------------------------------------------------------------------


def test_what_blocks_hold_beyond_the_smallest_is_bounded_in_all() -> None:
    memory = DownloadMemory(3 * MIB)
    with ExitStack() as held:
        sizes = [held.enter_context(memory.block(2 * MIB)) for _ in range(5)]
        assert sizes[0] == 2 * MIB and sizes[-1] == SMALL
        assert sum(size - SMALL for size in sizes) == 3 * MIB
    assert memory.left == 3 * MIB


def test_a_small_block_needs_no_shared_memory() -> None:
    memory = DownloadMemory(0)
    with memory.block(SMALL - 1) as size, memory.block(LARGE) as another:
        assert (size, another) == (SMALL - 1, SMALL)


def test_blocks_grow_for_who_reads_fast_and_are_small_again_for_who_does_not() -> None:
    sizes = [SMALL]
    while sizes[-1] < LARGE:
        sizes.append(next_block_size(sizes[-1], seconds=0.1))
    assert sizes == [SMALL, *(SMALL * 2**n for n in range(1, 6))]
    assert next_block_size(LARGE, seconds=0.1) == LARGE
    assert next_block_size(LARGE, seconds=2.0) == SMALL
