"""Rows are checked by processes of bounded time and memory, in turn between projects; a file that breaks one ends."""

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from sqlalchemy import update

from api.core.db.database import session_scope
from api.core.db.tables import File
from api.core.files import validation
from api.core.files.storage import get_storage
from tests.things import a_file, a_project
from worker.maintenance import row_checks, row_reader
from worker.maintenance.row_checks import LANES, MAX_CHECKS, Lane, RoundRobin

pytestmark = pytest.mark.usefixtures("service")

ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
GOOD = json.dumps(ROW).encode() + b"\n"


def a_stored_file(content: bytes = GOOD, *, project: str | None = None, size: int | None = None) -> str:
    with session_scope() as session:
        owner = a_project(session)
        file = a_file(session, owner, status="uploaded", validation=None, bytes=len(content) if size is None else size)
        file.project_id = project or owner.id
        session.commit()
    get_storage().put(file.storage_key, io.BytesIO(content))
    return file.id


def a_project_id() -> str:
    with session_scope() as session:
        project = a_project(session)
        session.commit()
    return project.id


def row_of(file_id: str) -> File:
    with session_scope(read_only=True) as session:
        return session.get_one(File, file_id)


def a_lane() -> Lane:
    return Lane("any", above=-1, up_to=None)


def delete(file_id: str) -> None:
    with session_scope() as session:
        session.execute(update(File).where(File.id == file_id).values(deleted_at=validation.now(session)))
        session.commit()


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Storage keys in the order in which they were checked, without a process."""
    order = list[str]()

    def read(chunks: Iterator[bytes], **_: object) -> dict[str, object]:
        order.append(b"".join(chunks).decode())
        return {"status": "processed", "status_details": None, "validation": {}}

    monkeypatch.setattr(row_reader, "read", read)
    return order


def raises(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def read(*_: object, **__: object) -> dict[str, object]:
        raise error

    monkeypatch.setattr(row_reader, "read", read)


# --- what comes of a file ------------------------------------------------------------------------


def test_a_good_file_becomes_processed() -> None:
    file_id, lane = a_stored_file(), LANES[0]
    assert lane() is True
    assert lane() is False
    file = row_of(file_id)
    assert file.status == "processed"
    assert file.validation is not None
    assert (file.validation["kind"], file.validation["valid_rows"]) == ("chat", 1)


def test_a_hopeless_file_becomes_error_with_a_line_number() -> None:
    file_id = a_stored_file(b"nonsense\n")
    assert a_lane()()
    file = row_of(file_id)
    assert file.status == "error"
    assert file.status_details is not None
    assert "line 1" in file.status_details


def test_a_file_larger_than_a_pipe_is_read_to_its_end() -> None:
    file_id = a_stored_file(GOOD * 20_000)
    assert a_lane()()
    assert (row_of(file_id).validation or {})["rows"] == 20_000


def test_a_file_that_takes_too_long_ends_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_checks, "compute_time_limit", lambda size: 1)
    file_id, lane = a_stored_file(b"1\n" * 3_000_000), a_lane()
    assert lane() is True
    file = row_of(file_id)
    assert (file.status, file.validation) == ("error", None)
    assert file.status_details == "its rows cannot be checked: it took more than 1 s of a processor"
    assert lane() is False


def test_a_file_that_takes_too_much_memory_ends_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_reader, "MAX_BYTES", 64 << 20)
    file_id, lane = a_stored_file(b'{"messages":[' + b"[]," * 1_000_000 + b"[]]}"), a_lane()
    assert lane() is True
    file = row_of(file_id)
    assert (file.status, file.status_details) == (
        "error",
        "its rows cannot be checked: it took more than 64 MiB of memory",
    )
    assert lane() is False


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGBUS"])
def test_a_file_that_crashes_its_reader_ends_with_the_reason(name: str) -> None:
    found = ask(f"import os, signal; os.kill(os.getpid(), signal.{name})")
    assert found["status"] == "error"
    assert str(found["status_details"]).endswith(f"ended with {name}")


def test_a_file_whose_bytes_are_gone_ends_with_the_reason() -> None:
    file_id = a_stored_file()
    get_storage().delete(row_of(file_id).storage_key)
    assert a_lane()()
    assert (row_of(file_id).status, row_of(file_id).status_details) == ("error", "the file's bytes are gone")


# --- a child -------------------------------------------------------------------------------------


def ask(code: str, *, chunks: Iterator[bytes] | None = None, wanted: bool = True) -> dict[str, object]:
    """What comes of a child that runs `code` instead of checking."""
    return row_reader.read(
        iter([b"x"]) if chunks is None else chunks,
        seconds=5,
        leaving=threading.Event(),
        wanted=lambda: wanted,
        program=(sys.executable, "-c", code),
    )


@pytest.mark.parametrize("code", ["import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "raise SystemExit(1)"])
def test_a_child_that_others_ended_or_that_never_began_says_nothing_about_the_file(code: str) -> None:
    with pytest.raises(row_reader.Interrupted):
        ask(code)


def test_a_child_that_reads_nothing_is_left_when_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_reader, "BEAT_SECONDS", 0.0)
    with pytest.raises(row_reader.Unwanted):
        ask("import time; time.sleep(600)", chunks=iter([b"x" * 10_000_000]), wanted=False)


def test_a_child_knows_no_setting_of_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAINIT_S3_SECRET_ACCESS_KEY", "hidden")
    found = ask("import os; os.write(1, b'{\"broken\": \"%d\"}' % ('hidden' in os.environ.values()))")
    assert str(found["status_details"]).endswith(": 0")


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's; elsewhere the child ends when its input does")
def test_a_child_of_a_dead_parent_dies() -> None:
    parent = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-m', 'lorainit.data.formats.row_check', '60', '1000000000'],"
        " stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "child.stdin.write(b'1\\n' * 20000); child.stdin.flush()\n"  # more than a pipe holds: it has begun to read
        "print(child.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        assert process.stdout
        child = int(process.stdout.readline())
        process.kill()
    while True:  # pytest's own limit ends this if it does not
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return


# --- attempts ------------------------------------------------------------------------------------


def test_a_check_that_is_ended_over_and_over_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_checks, "PAUSE_SECONDS", 0.0)
    raises(monkeypatch, row_reader.Interrupted("it ended with SIGKILL"))
    file_id, lane = a_stored_file(), a_lane()
    for attempt in range(MAX_CHECKS):
        assert row_of(file_id).checks == attempt
        assert row_of(file_id).status == "uploaded"
        lane()
    assert row_of(file_id).status == "error"
    assert "5 times" in (row_of(file_id).status_details or "")
    assert lane() is False


def test_a_file_that_takes_the_reconciler_down_with_it_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_checks, "LEASE_SECONDS", 0.0)
    raises(monkeypatch, KeyboardInterrupt())  # stands for a process that is gone before it can write anything
    file_id = a_stored_file()
    for _ in range(MAX_CHECKS):
        with pytest.raises(KeyboardInterrupt):
            a_lane()()
    a_lane()()
    assert row_of(file_id).status == "error"


@pytest.mark.parametrize("error", [row_reader.Leaving(), row_reader.Unreadable("no route to host")])
def test_what_is_not_the_files_fault_costs_no_attempt(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    raises(monkeypatch, error)
    file_id = a_stored_file()
    assert a_lane()() is False
    assert (row_of(file_id).status, row_of(file_id).checks) == ("uploaded", 0)


def test_storage_that_does_not_answer_for_one_file_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    lane, lost, good = a_lane(), a_stored_file(), a_stored_file()
    storage = get_storage()
    key = row_of(lost).storage_key

    class Broken:
        def read(self, wanted: str) -> Iterator[bytes]:
            if wanted == key:
                raise OSError("Input/output error")
            yield from storage.read(wanted)

    monkeypatch.setattr(row_checks, "get_storage", Broken)
    lane()
    lane()
    assert (row_of(lost).status, row_of(good).status) == ("uploaded", "processed")


def test_a_check_is_given_up_when_its_file_is_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_reader, "BEAT_SECONDS", 0.0)
    file_id = a_stored_file()
    read = list[int]()

    class Endless:
        def read(self, _: str) -> Iterator[bytes]:
            delete(file_id)
            while True:
                read.append(1)
                yield GOOD * 10_000

    monkeypatch.setattr(row_checks, "get_storage", Endless)
    assert a_lane()() is True
    assert (row_of(file_id).status, len(read)) == ("uploaded", 1)


def test_a_reconciler_that_leaves_gives_its_file_back_at_once() -> None:
    file_id, lane = a_stored_file(GOOD * 20_000), a_lane()
    lane.leaving.set()
    assert lane() is False
    assert row_of(file_id).checks == 0
    assert a_lane()() is True
    assert row_of(file_id).status == "processed"


# --- two reconcilers -----------------------------------------------------------------------------


def claim(file_id: str, *, seconds: float = 60.0) -> validation.Claim | None:
    with session_scope() as session:
        found = validation.claim(session, row_of(file_id).project_id, above=-1, up_to=None, seconds=seconds)
        session.commit()
    return found


def test_a_file_is_checked_by_one_reconciler_at_a_time() -> None:
    file_id = a_stored_file()
    assert claim(file_id) is not None
    assert claim(file_id) is None
    assert a_lane()() is False


def test_a_file_whose_reconciler_fell_is_checked_after_its_lease() -> None:
    file_id = a_stored_file()
    assert claim(file_id, seconds=0.0) is not None
    assert a_lane()() is True
    assert (row_of(file_id).status, row_of(file_id).checks) == ("processed", 2)


def test_a_reconciler_that_slept_writes_nothing_about_its_successors_file() -> None:
    file_id = a_stored_file()
    asleep, successor = claim(file_id, seconds=0.0), claim(file_id)
    assert asleep and successor
    with session_scope() as session:
        assert not validation.renew(session, asleep, seconds=60.0)
        assert not validation.record_result(session, asleep, validation.unusable_result("it took too long"))
        assert validation.record_result(session, successor, {"status": "processed"})
        session.commit()
    assert row_of(file_id).status == "processed"


# --- whose turn it is ----------------------------------------------------------------------------


def test_a_project_with_many_files_delays_others_by_one(checked: list[str]) -> None:
    many, few, lane = a_project_id(), a_project_id(), a_lane()
    for number in range(3):
        a_stored_file(f"many {number}".encode(), project=many)
    a_stored_file(b"few", project=few)
    while lane():
        pass
    assert checked == ["many 0", "few", "many 1", "many 2"]


def test_projects_take_turns_and_a_newcomer_is_first() -> None:
    turns = RoundRobin()
    assert [turns.next(["a", "b"]) for _ in range(3)] == ["a", "b", "a"]
    assert turns.next(["a", "b", "c"]) == "c"
    assert turns.next(["a", "b", "c"]) == "b"
    assert turns.next([]) is None


def test_a_small_file_waits_for_no_large_one(checked: list[str]) -> None:
    a_stored_file(b"large", size=1 << 30)
    a_stored_file(b"medium", size=30 << 20)
    a_stored_file(b"small")
    assert LANES[0]() is True
    assert checked == ["small"]


@pytest.mark.parametrize("size", [0, 1, 8 << 20, (8 << 20) + 1, 64 << 20, (64 << 20) + 1, 8 << 30])
def test_a_file_of_any_size_has_one_lane(size: int, checked: list[str]) -> None:
    a_stored_file(size=size)
    assert sum(lane() for lane in LANES) == 1
