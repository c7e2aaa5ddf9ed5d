"""Room on disks: what is full is recognised whoever says so, and a real full disk is refused cleanly."""

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from obstore.exceptions import GenericError
from sqlalchemy.exc import OperationalError

from api.core.files import disk
from api.core.files.disk import Volume
from api.core.settings import Settings

STORE = "Generic LocalFileSystem error: Unable to copy data to file: No space left on device (os error 28)"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        GenericError(STORE),
        OperationalError("INSERT", {}, Exception("database or disk is full")),
    ],
)
def test_a_full_disk_is_recognised_whoever_says_so(error: Exception) -> None:
    assert disk.is_full(error)


@pytest.mark.parametrize(
    "error", [OSError(errno.EACCES, "Permission denied"), GenericError("timeout"), ValueError("x")]
)
def test_other_trouble_is_not_taken_for_a_full_disk(error: Exception) -> None:
    assert not disk.is_full(error)


def test_the_cause_of_an_error_counts_and_names_its_volume(tmp_path: Path) -> None:
    volumes = [Volume("scratch", tmp_path / "runs"), Volume("storage", tmp_path / "storage")]
    error = RuntimeError("the archive could not be written")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "storage" / "a" / "b"))
    assert disk.is_full(error)
    assert disk.find_volume_of(error, volumes) == volumes[1]


def test_a_volume_that_is_not_there_yet_has_the_room_of_the_folder_above(tmp_path: Path) -> None:
    volume = Volume("scratch", tmp_path / "not" / "yet")
    assert 0 < volume.free <= volume.size
    assert volume.device == tmp_path.stat().st_dev


def test_a_volume_that_cannot_be_written_fails_its_probe(tmp_path: Path) -> None:
    Volume("scratch", tmp_path / "new").probe()
    (tmp_path / "file").write_text("in the folder's place")
    with pytest.raises(OSError, match="file"):
        Volume("scratch", tmp_path / "file").probe()


def test_only_folders_of_this_host_are_volumes(tmp_path: Path) -> None:
    remote = Settings(state_dir=tmp_path, database_url="postgresql://host/x", storage_url="s3://bucket")
    assert disk.list_service_volumes(remote) == []
    assert [volume.name for volume in disk.list_worker_volumes(remote)] == ["scratch", "model cache"]
    local = Settings(state_dir=tmp_path)
    assert [volume.name for volume in disk.list_service_volumes(local)] == ["storage", "database"]


FULL = """
    import io, os, sys
    from pathlib import Path
    from api.core.files import disk, files
    from api.core.errors import StorageFull
    from api.core.settings import get_settings
    from api.core.files.storage import get_storage

    storage = get_storage()
    try:
        files.store(storage, io.BytesIO(bytes(1 << 20)), project_id="p", limit=1 << 30)
    except StorageFull:
        print("refused")
    print(sum(path.is_file() for path in Path(os.environ["FOLDER"]).rglob("*")))
    try:
        storage.put("jobs/x", iter([bytes(1 << 20)]))
    except Exception as error:
        print(disk.is_full(error))
"""


@pytest.mark.parametrize("floor", ["0", "100000"])
def test_a_disk_that_is_really_full_refuses_an_upload_and_keeps_nothing_of_it(tmp_path: Path, floor: str) -> None:
    folder = tmp_path / "storage"
    folder.mkdir()
    mount = [
        "unshare",
        "--user",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        'mount -t tmpfs -o size=256k none "$0" && "$@"',
    ]
    if subprocess.run([*mount, str(folder), "true"], check=False, capture_output=True).returncode:
        pytest.skip(
            "a small tmpfs in a user namespace is not permitted here; the injected ENOSPC above is all there is"
        )
    settings = {"LORAINIT_STATE_DIR": str(tmp_path), "LORAINIT_MIN_FREE_BYTES": floor, "FOLDER": str(folder)}
    command = [*mount, str(folder), sys.executable, "-c", textwrap.dedent(FULL)]
    root = str(Path(__file__).parents[4])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, **settings, "PYTHONPATH": path}
    )
    assert done.stdout.split() == ["refused", "0", "True"]
