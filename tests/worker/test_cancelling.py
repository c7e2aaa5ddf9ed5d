"""A cancelled job is gone from its worker within five seconds, whatever it was doing there.

The real training process is held in each of its stages by what it does first (warm_child.py), storage by a stand-in
that is slow or hangs; the worker and the cancelling are as they are.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any, BinaryIO

import psutil
import pytest
from sqlalchemy import select

from api.core.db.database import session_scope
from api.core.db.tables import Adapter, Checkpoint, File, Job
from api.core.files.storage import get_storage
from api.core.settings import get_settings
from tests.lorainit.conftest import chat
from tests.promises import within
from tests.stack import runs_below
from tests.worker.conftest import Lab, await_what_was_left_alone, when
from worker import tasks
from worker.job import artifacts, job_writer, leased_storage, outcomes

LIMIT = 5.0
# The run stays where it says for the first time that it is in a stage, or a tick further.
HELD = """
import time
from pathlib import Path
from lorainit import __main__ as program
where, write = [], program._write_event
def held(stream, event):
    write(stream, event)
    where[:] = [event.stage] if event.kind == "stage" else where
    if where == [{stage!r}] and event.kind == {by!r}:
        Path("in-its-stage").touch()  # not `held`, which is the lock of a folder (worker.host.scratch)
        time.sleep(600)
program._write_event = held
"""


@pytest.fixture
def lab(service: None, environment: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Lab]:
    """One queued job that runs alone, and a worker that looks after its lease often."""
    environment.setenv("LORAINIT_BEAT_SECONDS", "0.2")
    environment.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    get_settings.cache_clear()
    yield Lab(tmp_path, environment, count=1)
    await_what_was_left_alone()
    assert not list(get_settings().scratch().glob("ftjob-*")), "a scratch folder was left behind"


def cancelled_once(lab: Lab, busy: Callable[[], Any], run: Callable[[], None]) -> None:
    """`run` one notification, cancel the job when the worker is `busy` with it, and look at what is left."""
    at: list[float] = []

    def cancel() -> None:
        lab.cancel(1)
        at.append(time.monotonic())

    canceller = when(busy, cancel)
    run()
    canceller.join()
    assert time.monotonic() - at[0] < within(LIMIT), "the worker's slot was not free in time"
    assert lab.statuses() == ["cancelled"]
    assert lab.story(1)[-1] == "The job was cancelled"
    assert not runs_below(psutil.Process())
    with session_scope() as session:
        assert session.get(Adapter, lab.ids[0]) is None


# --- in the training process ----------------------------------------------------------------------


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize(
    ("stage", "by", "method"),
    [
        ("loading", "stage", "kaiming"),
        ("initializing", "stage", "kaiming"),
        pytest.param("initializing", "tick", "lora_ga", id="evidence"),
        pytest.param("initializing", "tick", "hrp", id="preheat"),
        ("training", "stage", "kaiming"),
        ("evaluating", "stage", "kaiming"),
        ("exporting", "stage", "kaiming"),
        ("verifying", "stage", "kaiming"),
    ],
)
def test_a_job_cancelled_in_a_stage_of_its_run_frees_its_worker(
    lab: Lab,
    environment: pytest.MonkeyPatch,
    before_run: Callable[[str], None],
    tiny_base: Path,
    stage: str,
    by: str,
    method: str,
) -> None:
    environment.setenv("LORAINIT_CATALOGUE", str(tiny_base / "catalogue.toml"))
    get_settings.cache_clear()
    rows = "".join(json.dumps(chat(f"What is {n}?", f"It is {n} and {n}")) + "\n" for n in range(8))
    with session_scope() as session:
        job = session.get_one(Job, lab.ids[0])
        lora = {**job.recipe["lora"], "r": 2, "init": {"method": method}}
        job.recipe = {"lora": lora, "training": {**job.recipe["training"], "max_steps": 3, "eval_interval": 1}}
        job.model, job.validation_file_id = "tiny", job.training_file_id
        session.commit()
    get_storage().put(training_key(lab), iter([rows.encode()]))
    before_run(HELD.format(stage=stage, by=by))
    folder = get_settings().scratch() / lab.ids[0]
    cancelled_once(lab, lambda: list(folder.glob("attempt-*/in-its-stage")), lambda: tasks.run_job("ftjob-x"))


def training_key(lab: Lab) -> str:
    with session_scope() as session:
        return session.get_one(File, lab.job(1).training_file_id).storage_key


@pytest.mark.one_database
def test_a_job_cancelled_in_the_queue_is_never_run(lab: Lab) -> None:
    lab.cancel(1)
    lab.run("raise SystemExit('nobody may start this')")
    assert (lab.statuses(), lab.job(1).attempts) == (["cancelled"], 0)


# --- between worker and storage -------------------------------------------------------------------


class Slow:
    """Storage in which one method takes for ever: by a chunk every tenth of a second, or all at once."""

    def __init__(self, method: str, key: str, *, hangs: bool) -> None:
        self.busy, self.chunks, self._closed = threading.Event(), 0, threading.Event()
        self._storage, self._method, self._key, self._hangs = get_storage(), method, key, hangs

    def close(self) -> None:
        self._closed.set()

    def put(self, key: str, source: BinaryIO | Path | Iterator[bytes]) -> None:
        slow = self._method == "put" and self._key in key
        assert isinstance(source, Iterator)
        self._storage.put(key, self._drawn_out(source) if slow else source)

    def read(self, key: str, *, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        chunks = self._storage.read(key, start=start, end=end)
        return self._drawn_out(chain(chunks, repeat(b"", 300))) if self._method == "read" else chunks

    def _drawn_out(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self.busy.set()
            self.chunks += 1
            yield chunk
            if self._closed.wait(600 if self._hangs else 0.1):
                return

    delete: Any = property(lambda self: self._storage.delete)


CHECKPOINT = "shown(0, 1); checkpoint(0, 1); time.sleep(60)"
DONE = "shown(0, 1); done(0)"


@pytest.fixture
def slow(lab: Lab, environment: pytest.MonkeyPatch) -> Iterator[Callable[..., Slow]]:
    made: list[Slow] = []

    def make(method: str, key: str, *, hangs: bool) -> Slow:
        storage = Slow(method, key, hangs=hangs)
        made.append(storage)
        environment.setattr(leased_storage, "CHUNK", 32)  # of ten kilobytes: half a minute
        environment.setattr(job_writer, "get_storage", lambda: storage)
        return storage

    yield make
    for storage in made:
        storage.close()


@pytest.mark.one_database
@pytest.mark.parametrize("hangs", [True, False], ids=["hangs", "trickles"])
@pytest.mark.parametrize(
    ("method", "key", "script"),
    [
        pytest.param("read", "", DONE, id="fetching its files"),
        pytest.param("put", "adapter.tar", DONE, id="uploading the adapter"),
        pytest.param("put", "step-1/state.tar", CHECKPOINT, id="uploading a checkpoint"),
        pytest.param("put", "step_metrics", DONE, id="uploading the metrics"),
    ],
)
def test_a_job_cancelled_in_a_transfer_frees_its_worker(
    lab: Lab, slow: Callable[..., Slow], method: str, key: str, script: str, hangs: bool
) -> None:
    storage = slow(method, key, hangs=hangs)
    cancelled_once(lab, storage.busy.is_set, lambda: lab.run(script))
    with session_scope() as session:
        assert session.scalars(select(Checkpoint.id)).all() == []


@pytest.mark.one_database
def test_a_job_cancelled_while_its_failure_is_written_frees_its_worker(
    lab: Lab, slow: Callable[..., Slow], environment: pytest.MonkeyPatch
) -> None:
    """What the worker itself could not do ends the job, with the metrics so far as its result."""

    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("a bug")

    storage = slow("put", "step_metrics", hangs=True)
    environment.setattr(artifacts, "pack", broken)
    environment.setattr(outcomes, "get_storage", lambda: leased_storage.LeasedStorage(storage, threading.Event()))
    cancelled_once(lab, storage.busy.is_set, lambda: lab.run(DONE))


@pytest.mark.one_database
@pytest.mark.parametrize(("method", "script"), [("read", DONE), ("put", DONE)])
def test_a_transfer_of_a_cancelled_job_ends_and_leaves_nothing(
    lab: Lab, slow: Callable[..., Slow], method: str, script: str
) -> None:
    storage = slow(method, "adapter.tar", hangs=False)
    cancelled_once(lab, storage.busy.is_set, lambda: lab.run(script))
    time.sleep(0.5)
    so_far = storage.chunks
    time.sleep(0.5)
    assert storage.chunks == so_far
    assert not [path for path in (lab.folder / "storage").rglob("*adapter.tar*") if path.is_file()]
