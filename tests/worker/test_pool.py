"""A worker has a process for each slot and listens where its settings say; a command line that differs is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from api.core.queue.queue import get_celery
from tests.conftest import forget
from tests.things import ON_ONE_DATABASE
from worker import pool

pytestmark = ON_ONE_DATABASE
REFUSED = [
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
]
# Each command line in a process that is forked once Celery and the worker are imported, which takes seconds.
FORKED = """
import json, os, sys
from pathlib import Path
import worker.app
from celery.__main__ import main
for number, arguments in enumerate(json.loads(sys.argv[1])):
    if os.fork() == 0:
        for fd in (1, 2):
            os.dup2(os.open(f"{number}.{fd}", os.O_WRONLY | os.O_CREAT), fd)
        sys.argv = ["celery", "-A", "worker.app", "worker", *arguments]
        sys.exit(main())
    Path(f"{number}.code").write_text(str(os.waitstatus_to_exitcode(os.wait()[1])))
"""


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


def test_a_command_line_that_says_something_else_is_refused_in_one_line(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment.setenv("LORAINIT_BROKER_URL", "redis://127.0.0.1:1/0")
    lines = json.dumps([arguments for arguments, _ in REFUSED])
    root = str(Path(__file__).parents[2])
    environment.setenv("PYTHONPATH", root)
    subprocess.run([sys.executable, "-c", FORKED, lines], check=True, cwd=tmp_path)
    for number, (arguments, words) in enumerate(REFUSED):
        code, out, err = ((tmp_path / f"{number}.{name}").read_text() for name in ("code", "1", "2"))
        assert (code, out, len(err.splitlines())) == ("1", "", 1), (arguments, err)
        assert err.startswith("error: ")
        assert words in err, arguments


def test_a_size_that_the_environment_gives_celery_is_refused_too(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment.setenv("LORAINIT_BROKER_URL", "redis://127.0.0.1:1/0")
    environment.setenv("CELERY_WORKER_CONCURRENCY", "7")
    command = [sys.executable, "-m", "celery", "-A", "worker.app", "worker"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, "asks for 7 processes" in done.stderr) == (1, True)
