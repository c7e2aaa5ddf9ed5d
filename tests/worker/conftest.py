"""Queued jobs that ask for a group, and a worker whose child is a script (tests/worker/child_script.py)."""

import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from api.core.db.database import session_scope
from api.core.db.tables import Adapter, Event, File, Job, Project
from api.core.devices.run_environment import make_environment_without_secrets
from api.core.files.storage import get_storage
from api.core.jobs import jobs, metrics
from api.core.settings import get_settings
from tests.things import a_file, a_project, a_queued_job
from tests.worker import warm_child
from worker import tasks
from worker.child import warm
from worker.child.supervisor import run_child


class Lab:
    """Queued jobs of one project that ask for a group, told apart by their seeds 1, 2, 3 ..."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, count: int = 3) -> None:
        self.folder, self._patch = folder, patch
        with session_scope() as session:
            self.project = a_project(session)
            self.ids = [self._queued(session, self.project, seed) for seed in range(1, count + 1)]
            session.commit()

    @staticmethod
    def _queued(session: Any, project: Project, seed: int) -> str:
        file = a_file(session, project)
        get_storage().put(file.storage_key, iter([b"{}\n"]))
        return a_queued_job(session, project, file=file, seed=seed, wants_group=True, group_key="k").id

    def move(self, seed: int, queue: str) -> None:
        """Let a job wait in another queue."""
        with session_scope() as session:
            session.get_one(Job, self.ids[seed - 1]).queue = queue
            session.commit()

    def child(self, script: str) -> None:
        """What the next run's process does."""
        path = self.folder / "script.py"
        path.write_text("from tests.worker.child_script import *\n" + textwrap.dedent(script))
        program = (sys.executable, str(path))
        self._patch.setattr(tasks, "run_child", partial(run_child, program=program))

    def run(self, script: str) -> None:
        """Run what one notification makes a worker do."""
        self.child(script)
        tasks.run_job("ftjob-x")

    def job(self, seed: int) -> Job:
        with session_scope() as session:
            return session.get_one(Job, self.ids[seed - 1])

    def statuses(self) -> list[str]:
        return [self.job(seed).status for seed in range(1, len(self.ids) + 1)]

    def story(self, seed: int) -> list[str]:
        query = select(Event.message).where(Event.job_id == self.ids[seed - 1]).order_by(Event.sequence)
        with session_scope() as session:
            return list(session.scalars(query))

    def lost_runs(self, seed: int) -> list[tuple[int, float]]:
        with session_scope() as session:
            return [(row["step"], row["train_loss"]) for row in metrics.read(session, self.ids[seed - 1])]

    def cancel(self, seed: int) -> None:
        with session_scope() as session:
            jobs.cancel(session, session.get_one(Job, self.ids[seed - 1]))
            session.commit()

    def adapter(self, seed: int) -> bytes:
        with session_scope() as session:
            row = session.get_one(Adapter, self.ids[seed - 1])
            return b"".join(get_storage().read(session.get_one(File, row.file_id).storage_key))


@pytest.fixture
def lab(service: None, environment: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Lab]:
    environment.setenv("LORAINIT_BEAT_SECONDS", "0.05")
    environment.setenv("LORAINIT_STOP_GRACE_SECONDS", "5")
    environment.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    get_settings.cache_clear()
    yield Lab(tmp_path, environment)
    await_what_was_left_alone()
    assert not list(get_settings().scratch().glob("ftjob-*")), "a scratch folder was left behind"


@pytest.fixture(scope="session")
def warm_process() -> Iterator[warm.WarmProcess]:
    """A process that has loaded torch, from which the runs of all tests are forked (tests/worker/warm_child.py)."""
    process = warm.WarmProcess((sys.executable, "-m", warm_child.__name__))
    make_ready(process)
    yield process
    process.close()


@pytest.fixture
def before_run(environment: pytest.MonkeyPatch, warm_process: warm.WarmProcess) -> Callable[[str], None]:
    """Runs of this worker are forked, and do what they are given first."""
    make_ready(warm_process)  # a test may have ended it
    environment.setattr(warm, "get_warm_process", lambda: warm_process)
    return partial(environment.setenv, warm_child.BEFORE_RUN)


def make_ready(process: warm.WarmProcess) -> None:
    """Start it, unless it runs, and wait until it has loaded everything."""
    process.prepare(make_environment_without_secrets())
    deadline = time.monotonic() + 300
    while not process.is_ready():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


def await_what_was_left_alone() -> None:
    """Actions of lost jobs, for which no worker waits: they may hold a connection to this test's database."""
    for thread in threading.enumerate():
        if thread.name == "action":
            thread.join(300)
            assert not thread.is_alive()


def when(condition: Any, action: Any) -> threading.Thread:
    """Do something while a run is going on; a condition that never comes true fails the test."""

    def watch() -> None:
        deadline = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < deadline, "what the test waits for did not happen"
            time.sleep(0.02)
        action()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread
