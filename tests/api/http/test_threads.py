"""Threads of their own for what may take long."""

import threading
import time
from functools import partial

import anyio
import pytest
from fastapi.testclient import TestClient

from api.http import threads
from api.routes import jobs
from tests.api.conftest import JOBS, a_lab


@pytest.mark.usefixtures("service")
def test_searches_take_turns_and_polls_do_not_wait_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of several pairs may look through many rows, and a member may send many at once."""
    lab = a_lab()
    busy, most, lock = 0, 0, threading.Lock()
    page = jobs.lookup.list_page

    def slow(*arguments: object, metadata: dict[str, str], **others: object) -> object:
        nonlocal busy, most
        with lock:
            busy += bool(metadata)
            most = max(most, busy)
        if metadata:
            time.sleep(0.05)
        with lock:
            busy -= bool(metadata)
        return page(*arguments, metadata=metadata, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(jobs.lookup, "list_page", slow)
    with TestClient(lab.client.app, headers=lab.client.headers) as client:
        asked = [threading.Thread(target=client.get, args=(f"{JOBS}?metadata[a]={n}&metadata[b]=1",)) for n in range(8)]
        for one in asked:
            one.start()
        assert client.get(JOBS).status_code == 200
        for one in asked:
            one.join()
    assert 1 <= most <= threads.SEARCH_THREADS


def test_work_of_one_kind_waits_for_its_own_kind_only() -> None:
    released = threading.Event()

    async def all_at_once() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(threads.SEARCH_THREADS + 1):
                group.start_soon(threads.run_in_search_thread, partial(released.wait, 60))
            await anyio.wait_all_tasks_blocked()
            await threads.run_in_health_thread(released.set)

    began = time.monotonic()
    anyio.run(all_at_once)
    assert time.monotonic() - began < 60
