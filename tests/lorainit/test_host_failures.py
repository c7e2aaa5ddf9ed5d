"""A file that this host cannot read just now says nothing of the base, the rows or the checkpoint that it belongs to.

Opening one file fails here as it does on a broken disk, or where no more files can be opened.
"""

import builtins
import errno
import io
import json
import os
import shutil
from pathlib import Path

import pytest

from lorainit import __main__ as main
from lorainit.config.errors import CheckpointMismatch, HostFailed
from lorainit.config.spec import RunSpec
from lorainit.data.chat.stops import stop_tokens
from lorainit.model import sandbox
from lorainit.model.source import files, find, hub
from lorainit.run import run
from lorainit.train import checkpoint

pytestmark = pytest.mark.usefixtures("training_only")

AT = "checkpoints/step-000002"


@pytest.fixture
def cannot_open(monkeypatch):
    """Let opening the files of this name fail with this number, whichever way Python opens them."""

    def fail(name: str, number: int = errno.EIO) -> None:
        for module in (io, builtins):
            monkeypatch.setattr(module, "open", _failing(module.open, name, number))

    return fail


def _failing(opened, name, number):
    def open_(file, *args, **named):
        if not isinstance(file, int) and Path(file).name == name:
            raise OSError(number, os.strerror(number), str(file))
        return opened(file, *args, **named)

    return open_


def go(spec: RunSpec, out: Path) -> None:
    run(spec, out, lambda _: None)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("config.json", errno.EIO),
        ("config.json", errno.EMFILE),
        ("generation_config.json", errno.EIO),
        ("tokenizer.json", errno.EIO),
        ("tokenizer_config.json", errno.EIO),
        ("model.safetensors", errno.EIO),
        ("rows.jsonl", errno.EIO),
    ],
)
def test_a_file_that_the_host_cannot_read_is_no_verdict_on_its_owner(spec, tmp_path, cannot_open, name, number):
    one = spec()
    cannot_open(Path(one.data.training).name if name == "rows.jsonl" else name, number)
    with pytest.raises(HostFailed, match=os.strerror(number)) as told:
        go(one, tmp_path)
    assert told.value.code == "worker_lost"


def test_a_folder_that_the_host_cannot_list_is_no_verdict_on_the_base(tmp_path, monkeypatch):
    def fail(_folder):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "iterdir", fail)
    with pytest.raises(OSError, match="Input/output error"):
        files.check_folder(tmp_path)


def test_a_place_that_the_host_cannot_look_at_is_not_an_empty_one(tmp_path, monkeypatch):
    def fail(_path, **_named):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "stat", fail)
    with pytest.raises(OSError, match="Input/output error"):
        find.find(str(tmp_path))


def test_a_cache_that_the_host_cannot_read_is_no_verdict_on_a_hubs_model(monkeypatch):
    def fail(*_args, **_named):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(OSError, match="Input/output error"):
        hub.fetch("a/b", None)


def test_stop_tokens_are_not_guessed_where_the_file_that_names_them_cannot_be_read(bases, tokenizer, cannot_open):
    cannot_open("generation_config.json")
    with pytest.raises(OSError, match="Input/output error"):
        stop_tokens(tokenizer, bases["llama"])


def test_a_base_that_the_host_cannot_read_is_not_refused_by_an_inspection(bases, tmp_path, monkeypatch, cannot_open):
    said = []
    monkeypatch.setattr(sandbox, "_write_line", said.append)
    monkeypatch.setattr(sandbox.limits, "bound_memory", lambda _: None)
    monkeypatch.setattr(sandbox.limits, "die_with_parent", lambda: None)
    monkeypatch.setattr(sandbox.sys, "stdout", sandbox.sys.stdout)
    cannot_open("config.json")
    sandbox.inspect_for_parent(str(bases["llama"]), tmp_path)
    assert "Input/output error" in said[-1]["failed"]


def test_a_spec_that_the_host_cannot_read_is_no_wrong_spec(tmp_path, cannot_open):
    path = tmp_path / "spec.json"
    path.write_text("{}")
    cannot_open("spec.json")
    with pytest.raises(OSError, match="Input/output error"):
        main.main([str(path), str(tmp_path / "out")])


# --- checkpoints -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_before(spec, tmp_path_factory):
    """The folder of a run with checkpoints."""
    folder = tmp_path_factory.mktemp("before")
    go(spec(), folder)
    return folder


@pytest.fixture
def left(spec, run_before, tmp_path):
    """The spec that goes on from a checkpoint, and the checkpoint's folder, of this test alone."""
    folder = Path(shutil.copytree(run_before / AT, tmp_path / "first" / AT))
    return spec(resume_from=str(folder)), folder


@pytest.mark.parametrize("name", ["state.json", "adapter/manifest.json", "adapter/init_report.json", "metrics.jsonl"])
def test_a_checkpoint_that_the_host_cannot_read_is_not_called_damaged(left, tmp_path, cannot_open, name):
    cannot_open(Path(name).name)
    with pytest.raises(HostFailed, match="Input/output error"):
        go(left[0], tmp_path / "second")


def test_a_state_that_safetensors_cannot_open_is_not_called_missing(left, tmp_path, monkeypatch):
    def fail(path):
        raise FileNotFoundError(f"No such file or directory: {path}")

    monkeypatch.setattr(checkpoint, "load_file", fail)
    with pytest.raises(HostFailed):
        go(left[0], tmp_path / "second")


def cut(path: Path) -> None:
    os.truncate(path, 2000)


def emptied(path: Path) -> None:
    path.write_text("{}")


def a_list(path: Path) -> None:
    path.write_text("[]")


def without_a_recipe(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"recipe": None}))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("state.safetensors", cut),
        ("state.safetensors", Path.unlink),
        ("state.json", emptied),
        ("state.json", a_list),
        ("state.json", without_a_recipe),
        ("state.json", Path.unlink),
        ("metrics.jsonl", Path.unlink),
        ("adapter/init_report.json", Path.unlink),
        ("adapter/init_report.json", emptied),
        ("adapter/manifest.json", a_list),
        ("adapter", shutil.rmtree),
    ],
)
def test_a_damaged_checkpoint_is_told_as_that(left, tmp_path, name, damage):
    damage(left[1] / name)
    with pytest.raises(CheckpointMismatch, match="The checkpoint step-000002 is incomplete or damaged: ") as told:
        go(left[0], tmp_path / "second")
    assert told.value.param == "resume_from"


@pytest.mark.parametrize("kind", ["layer.", "optimizer."])
def test_a_checkpoint_whose_state_lacks_tensors_is_told_as_that(left, tmp_path, monkeypatch, kind):
    load = checkpoint.load_file
    monkeypatch.setattr(
        checkpoint, "load_file", lambda path: {k: v for k, v in load(path).items() if not k.startswith(kind)}
    )
    with pytest.raises(CheckpointMismatch):
        go(left[0], tmp_path / "second")
