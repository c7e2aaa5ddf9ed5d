"""Trouble that passes is waited out while the job is ours; anything else is raised at once."""

import threading
import time

import pytest
import structlog
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from api.core.db.database import make_engine
from tests.promises import within
from worker.job import retry
from worker.job.progress import LeaseLost
from worker.job.retry import retry_until_lost

pytestmark = pytest.mark.one_database
GONE = OperationalError("SELECT 1", {}, Exception("connection refused"))


def test_an_action_is_repeated_until_it_works() -> None:
    answers: list[Exception | str] = [GONE, GONE, "done"]

    def action() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert retry_until_lost(action, until=threading.Event()) == "done"


def test_waiting_ends_when_the_job_is_lost() -> None:
    lost = threading.Event()
    threading.Timer(0.5, lost.set).start()
    started = time.monotonic()

    def action() -> None:
        raise GONE

    with pytest.raises(LeaseLost):
        retry_until_lost(action, until=lost)
    assert time.monotonic() - started < within(2)


def test_an_action_that_hangs_is_left_alone_when_the_job_is_lost() -> None:
    lost, hung = threading.Event(), threading.Event()
    threading.Timer(0.3, lost.set).start()
    started = time.monotonic()
    with pytest.raises(LeaseLost):
        retry_until_lost(hung.wait, until=lost)
    assert time.monotonic() - started < within(2)
    hung.set()


def test_what_is_done_counts_though_the_job_was_lost_meanwhile() -> None:
    """As when the action itself ended the job: its lease is gone then."""
    lost = threading.Event()

    def action() -> str:
        lost.set()
        return "done"

    assert retry_until_lost(action, until=lost) == "done"


def test_an_actions_own_timeout_is_raised() -> None:
    def action() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        retry_until_lost(action, until=threading.Event())


def test_an_action_that_ends_at_the_moment_of_a_look_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at without a pause, some of these end between the look and what follows from it."""
    monkeypatch.setattr(retry, "CHECK_SECONDS", 0.0)

    def action() -> str:
        time.sleep(0.001)
        return "done"

    assert [retry_until_lost(action, until=threading.Event()) for _ in range(300)] == ["done"] * 300


def test_what_is_bound_to_the_log_is_bound_in_an_action_too() -> None:
    with structlog.contextvars.bound_contextvars(job_id="ftjob-1"):
        bound = retry_until_lost(structlog.contextvars.get_contextvars, until=threading.Event())
    assert bound["job_id"] == "ftjob-1"


def test_a_bug_is_not_waited_for() -> None:
    calls = list[int]()

    def action() -> None:
        calls.append(1)
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        retry_until_lost(action, until=threading.Event())
    assert len(calls) == 1


def test_a_transaction_that_postgresql_ended_while_we_slept_is_repeated(postgres_server: str) -> None:
    engine, naps = make_engine(postgres_server), iter((0.6, 0.0))

    def write() -> int | None:
        with engine.connect() as connection:
            connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 200"))
            time.sleep(next(naps))
            return connection.scalar(text("SELECT 7"))

    assert retry_until_lost(write, until=threading.Event()) == 7
    engine.dispose()
