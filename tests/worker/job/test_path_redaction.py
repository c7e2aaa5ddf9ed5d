"""No answer to a caller names a path of this host: the base is told by its id, files by their names."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from api.core.models import catalogue
from lorainit.config import sources
from lorainit.config.errors import LorainitError
from lorainit.config.events import Done, Event, Failed, Message
from lorainit.model.inspect import inspect
from tests.lorainit.conftest import change_json
from tests.things import MODEL, a_project, a_queued_job
from tests.worker.conftest import Lab
from tests.zoo.bases import make
from worker.job import path_redaction

pytestmark = pytest.mark.one_database
ABSOLUTE = re.compile(r"(?:^|[\s'\"(=])/\w+/")


def shown(event: Event, source: Path) -> Event:
    return path_redaction.redact_paths(event, {str(source): "tiny", "/scratch/ftjob-1/attempt-2/": ""})


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.bin")


def _part_of_an_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"x": "../b.safetensors"}})
    )


def _cut(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-8])


def _no_tokenizer(folder: Path) -> None:
    for path in folder.glob("token*"):
        path.unlink()


def _broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": 3}')


def _code_of_its_own(folder: Path) -> None:
    change_json(folder / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Config"})


def _tokenizer_of_its_own(folder: Path) -> None:
    auto = {"AutoTokenizer": ["mine.Tokenizer", None]}
    change_json(folder / "tokenizer_config.json", auto_map=auto, tokenizer_class="MineTokenizer")


def _adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def _pipe(folder: Path) -> None:
    os.mkfifo(folder / "extra.json")


def _activation(folder: Path) -> None:
    change_json(folder / "config.json", hidden_act="nothing")


BREAKS = [
    _no_config, _pickles, _part_of_an_index, _cut, _no_tokenizer, _broken_tokenizer, _code_of_its_own,
    _tokenizer_of_its_own, _adapter, _pipe, _activation,
]  # fmt: skip


@pytest.mark.parametrize("broken", BREAKS)
def test_no_refusal_of_a_base_names_a_path_of_this_host(tmp_path: Path, broken: Callable[[Path], None]) -> None:
    folder = make("llama3", tmp_path / "base")
    broken(folder)
    with pytest.raises(LorainitError) as caught:
        inspect(str(folder), cache=tmp_path / "cache")
    told = shown(Failed(code=caught.value.code, message=caught.value.message), folder)
    assert isinstance(told, Failed)
    assert str(tmp_path) not in told.message
    assert not ABSOLUTE.search(told.message)


@pytest.mark.parametrize("name", ["nothing", "no.gguf", "empty.gguf"])
def test_a_base_that_is_not_there_is_told_by_its_id(tmp_path: Path, name: str) -> None:
    source = tmp_path / name
    if name == "empty.gguf":
        source.write_bytes(b"")
    with pytest.raises(LorainitError) as caught:
        inspect(str(source), cache=tmp_path / "cache")
    told = shown(Failed(code=caught.value.code, message=caught.value.message), source)
    assert isinstance(told, Failed)
    assert not ABSOLUTE.search(told.message)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("'{base}' has no config.json", "'tiny' has no config.json"),
        ("{base}/config.json is broken", "tiny/config.json is broken"),
        ("{base}-2/x.json is broken", "x.json is broken"),
        (
            "No space left to write /scratch/ftjob-1/attempt-2/out/metrics.jsonl.",
            "No space left to write out/metrics.jsonl.",
        ),
        ("the cache ({home}/.cache/huggingface/hub) lacks files", "the cache (hub) lacks files"),
        ("cannot be fetched from https://hub.example/etc/x", "cannot be fetched from https://hub.example/etc/x"),
        ("no room in /dev/shm/nccl-x, or /dev/nvidia0", "no room in /dev/shm/nccl-x, or /dev/nvidia0"),
        ("POST /v1/fine_tuning/jobs and/or either/or", "POST /v1/fine_tuning/jobs and/or either/or"),
    ],
)
def test_paths_are_told_by_what_the_reader_knows(tmp_path: Path, text: str, told: str) -> None:
    said = Message(message="", data={"why": [text.format(base=tmp_path / "m", home=tmp_path)]})
    event = shown(said, tmp_path / "m")
    assert isinstance(event, Message)
    assert event.data["why"] == [told]


def test_where_the_adapter_lies_stays_for_the_worker() -> None:
    done = Done(adapter="/scratch/ftjob-1/attempt-2/out/adapter", trained_tokens=1, export_check={}, resources={})
    assert shown(done, Path("/m")) == done


def test_the_base_of_a_job_is_known_by_the_jobs_model(session: Session, tmp_path: Path) -> None:
    job = a_queued_job(session, a_project(session))
    names = path_redaction.find_public_names(job, tmp_path)
    assert names[str(sources.local_path(catalogue.require(MODEL).source))] == MODEL


def test_a_failed_jobs_error_and_events_name_no_path(lab: Lab) -> None:
    lab.run("""
        for i in range(len(members)):
            say(i, kind="message", message=f"Reading {members[i].out}/cache/x.bin")
            say(i, kind="failed", code="unsupported_model", message=f"{members[i].spec} is not there.")
    """)
    error = lab.job(1).error
    assert error is not None
    assert error["message"] == "spec.json is not there."
    assert "Reading out/cache/x.bin" in lab.story(1)
