"""The housekeeper: what a crash, a lost message or a cancel left undone gets done."""

import io
import json
import threading
from datetime import UTC, datetime, timedelta
from types import ModuleType
from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from api.core.db.database import plain_connection, session_scope
from api.core.db.tables import File, Job
from api.core.files import files
from api.core.files.storage import get_storage
from api.core.jobs import admission, jobs, metrics
from api.core.maintenance import pending
from api.core.queue import queue
from api.core.settings import Settings
from tests.things import CHECKED, a_file, a_job, a_project, a_queued_job, a_running_job
from worker import reconciler
from worker.maintenance import row_checks

pytestmark = pytest.mark.usefixtures("service")

ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def job_of(job_id: str) -> Job:
    with session_scope() as session:
        return session.get_one(Job, job_id)


def a_stored_file(text: str) -> str:
    get_storage().put("files/x", io.BytesIO(text.encode()))
    with session_scope() as session:
        file = a_file(session, a_project(session), storage_key="files/x", status="uploaded", validation=None)
        session.commit()
    return file.id


def test_a_waiting_job_is_queued_once_its_file_is_checked() -> None:
    file_id = a_stored_file((json.dumps(ROW) + "\n") * 12)
    with session_scope() as session:
        file = session.get_one(File, file_id)
        job = a_job(session, a_project(session), file=file)
        session.commit()
    reconciler.admit()
    assert job_of(job.id).status == "validating_files"
    assert row_checks.LANES[0]()
    reconciler.admit()
    assert job_of(job.id).status == "queued"


@pytest.mark.parametrize(
    ("chore", "module", "step"), [("admit", admission, "consider"), ("recover", jobs, "recover_lost_runs")]
)
def test_a_job_with_which_it_goes_wrong_holds_up_no_other(
    monkeypatch: pytest.MonkeyPatch, chore: str, module: ModuleType, step: str
) -> None:
    with session_scope() as session:
        project = a_project(session)
        made = [a_job(session, project) if chore == "admit" else a_running_job(session, project)[0] for _ in range(3)]
        session.execute(update(Job).values(lease_until=datetime.now(UTC) - timedelta(seconds=1)))
        session.commit()
        ids = sorted(job.id for job in made)
    real = getattr(module, step)

    def breaks_for_the_first(session: Session, *args: Any, **named: Any) -> Any:
        if ids[0] in (*args, *named.get("among", ())):
            raise OverflowError("a fault of ours")
        return real(session, *args, **named)

    monkeypatch.setattr(module, step, breaks_for_the_first)
    with pytest.raises(OverflowError, match="a fault of ours"):
        getattr(reconciler, chore)()
    before = "validating_files" if chore == "admit" else "running"
    assert [job_of(job_id).status for job_id in ids] == [before, "queued", "queued"]


def test_a_dead_broker_leaves_jobs_unannounced(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(job_id: str, name: str) -> None:
        raise queue.BrokerUnavailable("connection refused")

    with session_scope() as session:
        job = a_queued_job(session, a_project(session))
        session.commit()
    monkeypatch.setattr(queue, "notify_workers", refuse)
    reconciler.announce()
    assert job_of(job.id).notified_at is None


def test_workers_are_notified_of_every_queued_job_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with session_scope() as session:
        project = a_project(session)
        wanted = [a_queued_job(session, project).id for _ in range(3)]
        session.commit()
    notified = list[str]()
    monkeypatch.setattr(queue, "notify_workers", lambda job_id, name: notified.append(job_id))
    reconciler.announce()
    reconciler.announce()
    assert sorted(notified) == sorted(wanted)


def test_a_silent_workers_job_goes_back_and_workers_are_notified_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with session_scope() as session:
        job, _ = a_running_job(session, a_project(session))
        past = datetime.now(UTC) - timedelta(seconds=1)
        session.execute(update(Job).where(Job.id == job.id).values(lease_until=past))
        session.commit()
    notified = list[str]()
    monkeypatch.setattr(queue, "notify_workers", lambda job_id, name: notified.append(job_id))
    reconciler.recover()
    reconciler.announce()
    assert notified == [job.id]


def test_a_cancelled_job_still_gets_its_result_file() -> None:
    with session_scope() as session:
        job, lease = a_running_job(session, a_project(session))
        step = 1, {"train_loss": 2.0, "epoch": 0.5, "tokens": 9}
        metrics.save_steps(session, job.id, lease.token, [step], at=job.created_at)
        jobs.cancel(session, job)
        session.commit()
    reconciler.write_result_files()
    file_id = job_of(job.id).result_file_id
    assert file_id is not None
    with session_scope() as session:
        file = session.get_one(File, file_id)
    text = b"".join(get_storage().read(file.storage_key)).decode()
    assert text.splitlines()[1].startswith("1,2.0,")
    assert file.bytes == len(text.encode())


def test_an_ended_job_that_logged_nothing_is_looked_at_once() -> None:
    with session_scope() as session:
        jobs.cancel(session, a_queued_job(session, a_project(session)))
        session.commit()
    with session_scope() as session:
        assert len(metrics.find_without_csv(session)) == 1
    reconciler.write_result_files()
    with session_scope() as session:
        assert metrics.find_without_csv(session) == []


def test_a_chore_that_fails_or_hangs_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    stop, rounds = threading.Event(), list[str]()

    def broken() -> None:
        raise RuntimeError("no database")

    def stuck() -> None:
        stop.wait(10)

    def works() -> bool:
        rounds.append("again")
        if len(rounds) == 3:
            stop.set()
        return True

    monkeypatch.setattr(reconciler, "CHORES", (broken, stuck, works))
    reconciler.run(stop)
    assert len(rounds) == 3


def test_a_chore_that_goes_on_failing_is_tried_ever_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = list[float]()

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            pauses.append(timeout or 0.0)
            return False

        def is_set(self) -> bool:
            return len(pauses) == 9

    def broken() -> None:
        if len(pauses) < 8:
            raise OSError(28, "No space left on device")

    class Wake(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            pauses.append(timeout or 0.0)
            return False

    reconciler._repeat(broken, Wake(), threading.Event(), Stop())
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30, reconciler.SWEEP_SECONDS]


def test_a_chore_is_repeated_at_once_while_there_is_more_and_rests_then_as_long_as_it_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left, rests = [True, True, False], list[float]()

    def chore() -> bool:
        return left.pop(0)

    class Wake(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            rests.append(timeout or 0.0)
            stop.set()
            return False

    stop = threading.Event()
    monkeypatch.setattr(reconciler.janitor, "PAUSES", {chore: 3600.0})
    reconciler._repeat(chore, Wake(), threading.Event(), stop)
    assert (left, rests) == ([], [3600.0])


def test_each_chore_is_woken_by_what_there_is_to_do_and_by_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "notify_workers", lambda job_id, name: None)
    assert woken() == set()
    with session_scope() as session:
        project = a_project(session)
        file = a_file(session, project, status="uploaded", validation=None)
        job = a_job(session, project, file=file)
        session.commit()
    assert woken() == {"admit", "check_small_files", "check_medium_files", "check_large_files"}
    with session_scope() as session:
        session.execute(update(File).values(status="processed", validation=CHECKED))
        session.commit()
    assert woken() == {"admit"} and reconciler.admit()
    assert woken() == {"announce"} and reconciler.announce()
    with session_scope() as session:
        (_,) = jobs.claim(session, "w", lease_seconds=30)
        session.commit()
    assert woken() == set()
    with session_scope() as session:
        session.execute(update(Job).values(lease_until=datetime.now(UTC) - timedelta(seconds=1)))
        session.commit()
    assert woken() == {"recover"} and reconciler.recover()
    with session_scope() as session:
        jobs.cancel(session, session.get_one(Job, job.id))
        files.mark_deleted(session, session.get_one(File, file.id))
        session.commit()
    assert woken() == {"write_result_files", "clear"}


def woken() -> set[str]:
    with plain_connection() as connection:
        return {chore.__name__ for chore in reconciler._find_chores(pending.find_pending(connection))}


def test_a_look_whose_connection_died_is_an_error_and_the_next_one_has_another() -> None:
    with plain_connection() as connection:
        pending.find_pending(connection)
        connection.connection.driver_connection.close()
        with pytest.raises(Exception, match="closed"):
            pending.find_pending(connection)
        assert not any(pending.find_pending(connection))


def test_workers_are_notified_of_the_jobs_of_a_checked_file_without_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """One chore after another is woken by what the one before did, however long the pause between two looks is."""
    with session_scope() as session:
        project = a_project(session)
        file = a_file(session, project, status="uploaded", validation=None)
        a_job(session, project, file=file)
        session.commit()
    stop, notified = threading.Event(), list[str]()
    checked = iter([True])

    def check() -> bool:
        if not next(checked, False):
            return False
        with session_scope() as session:
            session.execute(update(File).values(status="processed", validation=CHECKED))
            session.commit()
        return True

    def notify(job_id: str, _name: str) -> None:
        notified.append(job_id)
        stop.set()

    monkeypatch.setattr(queue, "notify_workers", notify)
    monkeypatch.setattr(reconciler, "CHORES", (check, reconciler.admit, reconciler.announce))
    monkeypatch.setattr(reconciler, "WOKEN", {**reconciler.WOKEN, "unchecked": [check]})
    monkeypatch.setattr(reconciler, "SWEEP_SECONDS", 3600.0)
    monkeypatch.setattr(reconciler, "get_settings", lambda: Settings(reconcile_seconds=3600.0))
    patience = threading.Timer(60, stop.set)
    patience.start()
    reconciler.run(stop)
    patience.cancel()
    assert len(notified) == 1
