"""A worker has a process for each slot and listens where its settings say; a command line that differs is refused."""

import subprocess
import sys
from pathlib import Path

import pytest

from api.core.queue.queue import get_celery
from tests.conftest import forget
from worker import pool


@pytest.fixture(autouse=True)
def _two_slots(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("LORAINIT_WORKER_SLOTS", "2")
    environment.setenv("LORAINIT_WORKER_QUEUES", "train,slow")
    forget()


def test_the_number_of_processes_is_that_of_slots() -> None:
    assert get_celery().conf.worker_concurrency == 2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"concurrency": 2, "pool": "prefork", "queues": ["slow", "train"], "autoscale": None},
        {"concurrency": "2", "pool": "processes", "pool_start_method": "fork"},
    ],
)
def test_options_that_say_the_same_are_taken(options: dict[str, object]) -> None:
    assert pool.find_conflict(options) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-c", "3"], "-c (--concurrency) asks for 3 processes, and LORAINIT_WORKER_SLOTS is 2"),
        (["-c", "1"], "asks for 1 processes"),
        (["-c", "auto"], "asks for auto processes"),
        (["--autoscale", "4,1"], "set LORAINIT_WORKER_SLOTS (now 2)"),
        (["-P", "solo"], "leave --pool out"),
        (["-P", "threads"], "leave --pool out"),
        (["--pool-start-method", "spawn"], "leave --pool-start-method out"),
        (["--max-tasks-per-child", "1"], "leave --max-tasks-per-child out"),
        (["--max-memory-per-child", "100"], "leave --max-memory-per-child out"),
        (["-Q", "train"], "-Q (--queues) names train, and LORAINIT_WORKER_QUEUES is train, slow"),
        (["-X", "slow"], "leave -X (--exclude-queues) out"),
    ],
)
def test_a_command_line_that_says_something_else_is_refused_in_one_line(
    arguments: list[str], words: str, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment.setenv("LORAINIT_BROKER_URL", "redis://127.0.0.1:1/0")
    command = [sys.executable, "-m", "celery", "-A", "worker.app", "worker", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert done.stderr.startswith("error: ")
    assert words in done.stderr


def test_a_size_that_the_environment_gives_celery_is_refused_too(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment.setenv("LORAINIT_BROKER_URL", "redis://127.0.0.1:1/0")
    environment.setenv("CELERY_WORKER_CONCURRENCY", "7")
    command = [sys.executable, "-m", "celery", "-A", "worker.app", "worker"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, "asks for 7 processes" in done.stderr) == (1, True)
