"""Tar files: equal contents give equal bytes, and nothing follows a link."""

import tarfile
from pathlib import Path

import pytest

from worker.job.archive import pack, unpack


def a_folder(path: Path) -> Path:
    (path / "sub").mkdir(parents=True)
    (path / "b.txt").write_text("b")
    (path / "sub" / "a.txt").write_text("a")
    return path


def test_equal_contents_give_equal_bytes(tmp_path: Path) -> None:
    first = pack(a_folder(tmp_path / "one"), tmp_path / "one.tar", mtime=100)
    second = pack(a_folder(tmp_path / "two"), tmp_path / "two.tar", mtime=100)
    assert first.sha256 == second.sha256
    assert first.size == (tmp_path / "one.tar").stat().st_size


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    archive = pack(a_folder(tmp_path / "one"), tmp_path / "one.tar", mtime=100)
    unpack(archive.path, tmp_path / "out")
    assert (tmp_path / "out" / "sub" / "a.txt").read_text() == "a"
    with tarfile.open(archive.path) as tar:
        assert [(member.name, member.uid, member.mtime) for member in tar] == [("b.txt", 0, 100), ("sub/a.txt", 0, 100)]


def test_a_folder_that_is_itself_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(a_folder(tmp_path / "one"))
    with pytest.raises(ValueError, match="is a link"):
        pack(tmp_path / "link", tmp_path / "one.tar", mtime=100)


def test_a_link_to_a_folder_is_refused(tmp_path: Path) -> None:
    (a_folder(tmp_path / "one") / "etc").symlink_to("/etc")
    with pytest.raises(ValueError, match="etc is neither"):
        pack(tmp_path / "one", tmp_path / "one.tar", mtime=100)


def test_a_file_that_becomes_a_link_while_we_look_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = a_folder(tmp_path / "one")
    (folder / "link").symlink_to("/etc/passwd")
    monkeypatch.setattr(Path, "is_symlink", lambda _: False)  # as it was when it was looked at
    with pytest.raises(OSError, match="symbolic link"):
        pack(folder, tmp_path / "one.tar", mtime=100)


def test_a_link_is_refused(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "one")
    (folder / "link").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="link"):
        pack(folder, tmp_path / "one.tar", mtime=100)
