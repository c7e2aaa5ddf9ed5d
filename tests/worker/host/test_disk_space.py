"""Room for a run: a job waits while there is too little, fails where there can never be enough, and a
disk that fills up under it is a clean `disk_full`."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from obstore.exceptions import GenericError

from api.core.files import disk
from api.core.files.storage import ObjectStorage
from api.core.models import catalogue
from api.core.settings import get_settings
from lorainit.config.spec import Lora
from tests.worker.conftest import Lab
from worker import reconciler
from worker.host import disk_space, reservations, scratch
from worker.job import artifacts, retry

pytestmark = pytest.mark.one_database
GIB = 2**30
WORKS = "until(lambda: held(0)); step(0, 1); done(0)"
STORE = "Generic LocalFileSystem error: Unable to copy data to file: No space left on device (os error 28)"


class Disk(NamedTuple):
    """What `shutil.disk_usage` would say."""

    total: int
    used: int
    free: int


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    disk_space._waiting_for = None
    yield
    disk_space._waiting_for = None


def set_free(patch: pytest.MonkeyPatch, free: int, *, total: int = 1000 * GIB) -> None:
    patch.setattr(disk.shutil, "disk_usage", lambda _: Disk(total, total - free, free))  # type: ignore[attr-defined]


@pytest.fixture
def one(lab: Lab, environment: pytest.MonkeyPatch) -> Lab:
    """The lab, whose worker takes one job at a time."""
    environment.setenv("LORAINIT_GROUP_SIZE", "1")
    get_settings.cache_clear()
    return lab


def test_below_the_floor_no_job_is_taken(one: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        set_free(patch, GIB - 1)
        one.run(WORKS)
    assert one.statuses() == ["queued", "queued", "queued"]
    assert one.job(1).lease_token == 0
    one.run(WORKS)
    assert one.statuses() == ["succeeded", "queued", "queued"]


def test_a_job_that_does_not_fit_now_goes_back_at_no_cost_and_says_why(
    one: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_space, "SCRATCH_COPIES", 10**6)
    with monkeypatch.context() as patch:
        set_free(patch, 2 * GIB, total=10**9 * GIB)
        one.run(WORKS)
    job = one.job(1)
    assert (job.status, job.attempts) == ("queued", 0)
    assert "has 2.0 GiB free; the job goes back to the queue" in one.story(1)[-1]


def test_the_next_job_is_left_alone_until_the_room_is_there(one: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(disk_space, "SCRATCH_COPIES", 10**6)
        set_free(patch, 2 * GIB, total=10**9 * GIB)
        one.run(WORKS)
        one.run(WORKS)
        assert [one.job(seed).lease_token for seed in (1, 2, 3)] == [1, 0, 0]
    set_free(monkeypatch, 10**8 * GIB, total=10**9 * GIB)
    one.run(WORKS)
    assert one.job(1).status == "succeeded"


def test_a_job_that_can_never_fit_fails_with_the_figures(one: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_space, "SCRATCH_COPIES", 10**6)
    set_free(monkeypatch, 2 * GIB, total=3 * GIB)
    one.run(WORKS)
    error = one.job(1).error
    assert error is not None
    assert error["code"] == "disk_full"
    assert "has 3.0 GiB altogether" in error["message"]


def test_what_cannot_be_written_to_takes_no_job(one: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(volume: disk.Volume) -> None:
        if volume.name == "storage":
            raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(disk.Volume, "probe", refuse)
        one.run(WORKS)
    assert (one.statuses()[0], one.job(1).lease_token) == ("queued", 0)
    one.run(WORKS)
    assert one.statuses()[0] == "succeeded"


# --- room that others were promised ---------------------------------------------------------------


@pytest.fixture
def neighbour(one: Lab) -> Iterator[Path]:
    """The folder of another run of this host."""
    folder = get_settings().scratch() / "ftjob-neighbour" / "attempt-1"
    with scratch.lock_folder(folder):
        yield folder
    shutil.rmtree(folder.parent)


def needed(lab: Lab) -> disk_space.DeviceNeed:
    (share,) = disk_space.estimate_needs(lab.job(1), get_settings(), data_bytes=10)
    return share


def test_two_runs_do_not_count_on_the_same_bytes(one: Lab, neighbour: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    share = needed(one)
    reservations.reserve(neighbour, {share.device: 3 * GIB})
    with monkeypatch.context() as patch:
        set_free(patch, 3 * GIB + share.needed // 2)
        one.run(WORKS)
        assert one.statuses()[0] == "queued"
        assert "of which other runs have reserved 3.0 GiB" in one.story(1)[-1]
        # Nor is it tried again before there is room for both.
        one.run(WORKS)
        assert one.job(1).lease_token == 1
    set_free(monkeypatch, 3 * GIB + 2 * share.needed)
    one.run(WORKS)
    assert one.statuses()[0] == "succeeded"


def test_what_a_run_has_written_is_not_counted_twice(one: Lab, neighbour: Path) -> None:
    device = needed(one).device
    reservations.reserve(neighbour, {device: 1000})
    promise = (neighbour / reservations.RESERVATION).stat().st_size
    (neighbour / "state.tar").write_bytes(bytes(300))
    stored = get_settings().state_dir / "storage" / "jobs" / "ftjob-neighbour"
    stored.mkdir(parents=True)
    (stored / "adapter.tar").write_bytes(bytes(200))
    assert reservations.sum_outstanding(get_settings()) == {device: 500 - promise}
    (neighbour / "more").write_bytes(bytes(2000))
    assert reservations.sum_outstanding(get_settings()) == {}


def test_the_promise_of_a_process_that_was_killed_is_void(one: Lab) -> None:
    folder = get_settings().scratch() / "ftjob-dead" / "attempt-1"
    code = f"""if True:
        import time
        from pathlib import Path
        from worker.host import reservations, scratch
        held = scratch.lock_folder(Path({str(folder)!r}))
        reservations.reserve(Path({str(folder)!r}), {{1: 7}})
        print("promised", flush=True)
        time.sleep(60)"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        os.utime(folder, (time.time() - 3600,) * 2)
        assert reservations.sum_outstanding(get_settings()) == {1: 7}
        process.kill()
    assert reservations.sum_outstanding(get_settings()) == {}
    shutil.rmtree(folder.parent)


def test_of_two_processes_that_ask_at_once_one_gets_the_room(one: Lab, tmp_path: Path) -> None:
    """Both look before either has written a promise, if nothing keeps them apart."""
    code = """if True:
        import sys, time
        from pathlib import Path
        from api.core.settings import get_settings
        from worker.host import reservations, scratch
        folder = Path(sys.argv[1])
        held = scratch.lock_folder(folder)
        with reservations.lock_reservations(get_settings()):
            taken = reservations.sum_outstanding(get_settings(), besides=folder)
            time.sleep(0.5)
            if not taken:
                reservations.reserve(folder, {1: 10**9})
        print("waits" if taken else "goes", flush=True)
        sys.stdin.read()"""
    folders = [get_settings().scratch() / f"ftjob-{name}" / "attempt-1" for name in "ab"]
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for folder in folders
    ]
    said = sorted(process.stdout.readline().strip() for process in both if process.stdout)
    for process, folder in zip(both, folders, strict=True):
        process.communicate("")
        shutil.rmtree(folder.parent)
    assert said == ["goes", "waits"]


def test_folders_on_one_disk_share_its_room(one: Lab) -> None:
    (share,) = disk_space.estimate_needs(one.job(1), get_settings(), data_bytes=5)
    assert share.name == "scratch and model cache and storage"
    assert share.needed > disk_space.estimate_needs(one.job(1), get_settings(), data_bytes=0)[0].needed


def _full(self: Any, key: str, source: Any) -> None:
    raise GenericError(STORE)


def test_storage_that_stays_full_ends_the_job_as_disk_full(one: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "LONGEST_SECONDS", 0.3)
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStorage, "put", _full)
        one.run("until(lambda: held(0)); step(0, 1); checkpoint(0, 1); until(lambda: not held(0))")
    error = one.job(1).error
    assert error is not None
    assert error["code"] == "disk_full"
    assert "Free now: scratch" in error["message"]


def test_its_result_file_is_left_once_there_is_room(one: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "LONGEST_SECONDS", 0.3)
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStorage, "put", _full)
        one.run("until(lambda: held(0)); step(0, 1); checkpoint(0, 1); until(lambda: not held(0))")
    assert one.job(1).result_file_id is None
    reconciler.write_result_files()
    assert one.job(1).result_file_id is not None


def test_storage_that_is_full_for_a_moment_costs_nothing(one: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    put, times = ObjectStorage.put, iter(range(3))

    def soon(self: ObjectStorage, key: str, source: Any) -> None:
        if next(times, None) is not None:
            raise GenericError(STORE)
        put(self, key, source)

    monkeypatch.setattr(ObjectStorage, "put", soon)
    one.run("until(lambda: held(0)); step(0, 1); checkpoint(0, 1); done(0)")
    assert one.job(1).status == "succeeded"


@pytest.mark.parametrize("write", ["pack", "_fetch"])
def test_a_full_scratch_disk_ends_the_job_at_once_and_is_named(
    one: Lab, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", str(get_settings().scratch() / "ftjob-x" / "state.tar"))

    monkeypatch.setattr(artifacts, write, full)
    one.run("until(lambda: held(0)); checkpoint(0, 1); until(lambda: not held(0))")
    error = one.job(1).error
    assert error is not None
    assert error["code"] == "disk_full"
    assert "No space was left on the worker's volume of scratch." in error["message"]


def test_a_full_disk_in_the_run_itself_comes_with_the_figures(one: Lab) -> None:
    one.run("until(lambda: held(0)); failed(0, 'disk_full')")
    error = one.job(1).error
    assert error is not None
    assert "Free now: scratch" in error["message"]


def test_a_stored_checkpoint_leaves_the_scratch_folder(one: Lab) -> None:
    folder = get_settings().scratch() / one.ids[0] / "attempt-1" / "out" / "step-1"
    one.run(f"until(lambda: held(0)); checkpoint(0, 1); until(lambda: not Path({str(folder)!r}).exists()); done(0)")
    assert one.job(1).status == "succeeded"


def test_bytes_read_well() -> None:
    assert [disk.format_bytes(size) for size in (0, 3 * 2**20, int(1.26 * GIB))] == ["0 MiB", "3 MiB", "1.3 GiB"]


def test_the_estimate_covers_what_a_run_was_seen_to_write_and_is_not_far_off(one: Lab) -> None:
    # SmolLM2, rank 16 on all linear layers, LoRAM: bytes on disk of its checkpoint, adapter and converted base.
    checkpoint, adapter, base = 121_110_668, 42_710_419, 541_619_095
    job = one.job(1)
    lora, _ = Lora.model_validate({"init": {"method": "loram"}, "r": 16}).resolve()
    resolved = catalogue.resolve_targets(lora, catalogue.require(job.model))
    job.recipe = {**job.recipe, "lora": resolved.model_dump(mode="json")}
    needs = disk_space._estimate_by_volume(job, get_settings(), data_bytes=0)
    stored = (get_settings().keep_checkpoints + 2) * (checkpoint + adapter) + adapter
    assert stored < needs["storage"] < 1.5 * stored
    assert base < needs["model cache"] < 1.5 * base
    assert 4 * checkpoint + 3 * adapter < needs["scratch"] < 1.5 * (4 * checkpoint + 3 * adapter)
