"""Storage: a folder and a real S3 server behave alike."""

import hashlib
import io
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pydantic import SecretStr

from api.core.files.storage import CHUNK, Storage, make_storage
from api.core.settings import Settings
from tests import servers


@pytest.fixture(scope="module")
def bucket() -> Iterator[Storage]:
    with servers.seaweed() as s3:
        settings = Settings(
            s3_endpoint=s3["LORAINIT_S3_ENDPOINT"],
            s3_access_key_id=s3["LORAINIT_S3_ACCESS_KEY_ID"],
            s3_secret_access_key=SecretStr(s3["LORAINIT_S3_SECRET_ACCESS_KEY"]),
        )
        yield make_storage(f"{s3['LORAINIT_STORAGE_URL']}/prefix", settings)


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return make_storage((tmp_path / "storage").as_uri(), Settings())
    kept: Storage = request.getfixturevalue("bucket")
    return kept


def read(storage: Storage, key: str, **part: int) -> bytes:
    return b"".join(storage.read(key, **part))


def test_what_is_put_is_read(storage: Storage) -> None:
    storage.put("a/b.txt", io.BytesIO(b"hello"))
    assert read(storage, "a/b.txt") == b"hello"


def test_a_large_file_survives_in_pieces(storage: Storage, tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(os.urandom(20 * CHUNK + 7))
    storage.put("large", path)
    assert hashlib.sha256(read(storage, "large")).digest() == hashlib.sha256(path.read_bytes()).digest()


@pytest.mark.parametrize(
    ("start", "end", "expected"), [(0, 2, b"01"), (3, None, b"3456789"), (8, 99, b"89"), (5, 5, b"")]
)
def test_a_range_is_half_open_and_cut_at_the_end(
    storage: Storage, start: int, end: int | None, expected: bytes
) -> None:
    storage.put("digits", io.BytesIO(b"0123456789"))
    assert b"".join(storage.read("digits", start=start, end=end)) == expected


def test_putting_again_replaces(storage: Storage) -> None:
    storage.put("twice", io.BytesIO(b"first"))
    storage.put("twice", io.BytesIO(b"2"))
    assert read(storage, "twice") == b"2"


def test_a_missing_key_is_not_found(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        read(storage, "nowhere")


def test_deleting_removes_and_deleting_again_is_harmless(storage: Storage) -> None:
    storage.put("gone", io.BytesIO(b"x"))
    storage.delete("gone")
    storage.delete("gone")
    with pytest.raises(FileNotFoundError):
        read(storage, "gone")


def test_a_usable_storage_passes_its_probe(storage: Storage) -> None:
    storage.probe()


def test_an_unwritable_folder_fails_its_probe(tmp_path: Path) -> None:
    folder = tmp_path / "storage"
    storage = make_storage(folder.as_uri(), Settings())
    folder.rmdir()
    folder.write_text("a file in the folder's place")
    with pytest.raises(Exception, match=r"."):
        storage.probe()


def test_another_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="file:// or s3://"):
        make_storage("ftp://host/x", Settings())


def test_what_is_old_under_a_folder_is_listed_and_nothing_beside_it(storage: Storage) -> None:
    for key in ("shelf/a/b", "shelf/c", "shelflife/d", "other/e"):
        storage.put(key, io.BytesIO(b"x"))
    later, earlier = datetime.now(UTC) + timedelta(hours=1), datetime.now(UTC) - timedelta(hours=1)
    assert sorted(key for key, _ in storage.list_older(later, prefix="shelf")) == ["shelf/a/b", "shelf/c"]
    assert all(earlier < written < later for _, written in storage.list_older(later, prefix="shelf"))
    assert list(storage.list_older(earlier, prefix="shelf")) == []
    assert list(storage.list_older(later, prefix="nowhere")) == []
