"""A service that nobody asks anything sleeps: how often each process wakes, and what it asks, in a minute of a clock
that the test moves on. Nothing here depends on real time, so whoever adds a busy poll is told by a number.
"""

import asyncio
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import uvicorn

from api.app import create_app
from api.connections import Connection
from api.core.maintenance import pending
from api.core.settings import Settings, get_settings
from api.embedded import broker, service
from api.embedded.children import Child, sleeping
from api.server import Server
from tests.statements import statements
from worker import app, reconciler

MINUTE = 60.0
SLEEPER = [sys.executable, "-c", "import time; time.sleep(600)"]


class Clock:
    """Seconds that have passed, and how often somebody slept."""

    def __init__(self) -> None:
        self.now, self.sleeps = 0.0, 0

    def sleep(self, seconds: float) -> None:
        """Take no time."""
        self.now += seconds
        self.sleeps += 1


class Unset(threading.Event):
    """An event that nobody sets: whoever waits for it sleeps until the timeout."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout, "without a timeout this would be for ever"
        self.clock.sleep(timeout)
        return False


class Over(Unset):
    """Set when the minute is over."""

    def is_set(self) -> bool:
        return self.clock.now >= MINUTE


class Selector(selectors.SelectSelector):
    """An event loop's waiting, in no time."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "nothing would wake the loop"
        if timeout > 0.0:
            self.clock.sleep(timeout)
        return super().select(0)


class Loop(asyncio.SelectorEventLoop):
    """An event loop by a clock of ours."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(Selector(clock))
        self.clock = clock

    def time(self) -> float:
        return self.clock.now


def serve(clock: Clock, *, seconds: float, leave: Callable[[Server], object]) -> None:
    """The API on a real socket by this clock until `leave` is called, which is after so many seconds."""
    web = create_app()
    config = uvicorn.Config(web, log_config=None, http=Connection, ws="none")
    server = Server(web, config)
    loop = Loop(clock)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        loop.call_later(seconds, leave, server)
        loop.run_until_complete(server.serve([listener]))
    loop.close()


@pytest.mark.usefixtures("service")
def test_an_api_that_nobody_asks_wakes_once_a_second() -> None:
    clock = Clock()
    serve(clock, seconds=MINUTE, leave=lambda server: setattr(server, "should_exit", True))
    assert clock.sleeps <= 70  # sixty, and what begins and ends it


@pytest.mark.usefixtures("service")
def test_an_api_that_is_asked_to_stop_does_not_sleep_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "capture_signals", lambda _: nullcontext())  # it would raise the signal again
    clock = Clock()
    serve(clock, seconds=10.001, leave=lambda server: server.handle_exit(signal.SIGTERM, None))
    assert clock.now < 10.5


@pytest.mark.usefixtures("service")
def test_a_reconciler_without_work_looks_once_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, looks, look = Clock(), list[pending.PendingWork](), pending.find_pending
    monkeypatch.setattr(pending, "find_pending", lambda connection: looks.append(look(connection)) or looks[-1])
    wakes = {chore: threading.Event() for chore in reconciler.CHORES}
    with statements() as asked:
        reconciler._wake_chores(Unset(clock), wakes, Over(clock))
    assert 0 < len(looks) <= MINUTE / get_settings().reconcile_seconds
    assert not any(event.is_set() for event in wakes.values())
    assert asked == []  # beside the looks themselves


@pytest.mark.usefixtures("service")
def test_chores_without_work_look_for_themselves_twice_a_minute_at_most() -> None:
    look = threading.Event()
    for chore in reconciler.CHORES:
        clock = Clock()
        with statements() as asked:
            reconciler._repeat(chore, Unset(clock), look, Over(clock))
        assert clock.sleeps <= 2, chore.__name__
        assert len(asked) <= 2 * 6, (chore.__name__, asked)
    assert not look.is_set()


@pytest.mark.usefixtures("service")
def test_a_worker_without_work_speaks_six_times_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()

    class Stopped(Unset):
        def wait(self, timeout: float | None = None) -> bool:
            super().wait(timeout)
            return clock.now >= MINUTE

    monkeypatch.setattr(app, "_stopped", Stopped(clock))
    with statements() as asked:
        app._send_heartbeats()
    assert clock.sleeps <= 6
    assert len(asked) <= 6 * 5, asked


def test_the_parent_of_an_idle_service_looks_once_a_second(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = Clock()
    parent = service.Service(Settings(state_dir=tmp_path), report=print)

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        if clock.now >= MINUTE:
            parent.ask_to_stop()

    monkeypatch.setattr(service, "sleeping", lambda: nullcontext(sleep))
    with child(tmp_path) as one:
        parent.children.append(one)
        parent.watch()
    assert clock.sleeps <= MINUTE


def test_the_end_of_a_child_ends_its_parents_sleep(tmp_path: Path) -> None:
    began = time.monotonic()
    with child(tmp_path) as one, sleeping() as sleep:
        assert one.process is not None
        one.process.kill()
        sleep(600.0)
    assert time.monotonic() - began < 300


def test_a_child_that_fell_while_nobody_slept_is_found_at_once() -> None:
    began = time.monotonic()
    with sleeping() as sleep:
        subprocess.run([sys.executable, "-c", ""], check=True)
        sleep(600.0)
    assert time.monotonic() - began < 300


@contextmanager
def child(folder: Path) -> Iterator[Child]:
    one = Child("it", SLEEPER, os.environ, folder / "log")
    one.start()
    try:
        yield one
    finally:
        one.stop()


def test_a_broker_that_nobody_asks_wakes_once_a_second(tmp_path: Path) -> None:
    started, url = broker.start(tmp_path / "broker", log=tmp_path / "broker.log", environment=os.environ)
    try:
        with broker.Redis.from_url(url) as known:
            assert known.config_get("hz") == {"hz": "1"}
    finally:
        started.stop()
