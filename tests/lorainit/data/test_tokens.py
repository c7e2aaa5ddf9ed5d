"""Tokenized files and digests kept for the next run: the same words either way, and no trust in bad entries."""

import json
import os
import time
from pathlib import Path

import pytest
import torch

from lorainit.config.errors import InvalidTrainingFile, UnsupportedModel
from lorainit.config.events import Message, Tick
from lorainit.data import reader, tokens
from lorainit.data.dataset import refuse
from lorainit.data.reader import load, tokenize
from lorainit.model.base import open_base
from lorainit.model.load import load_tokenizer
from lorainit.model.source import digest
from lorainit.model.source.digest import base_sha256, cached_sha256, require_whole, write_digest
from lorainit.model.source.tokenizer_files import TEMPLATES
from lorainit.runtime.disk_cache import DiskCache
from tests.lorainit.conftest import chat, tiny_llama, write_rows
from tests.lorainit.contexts import prepared
from tests.lorainit.forked import Forked

MIXED = [
    chat("a", "b c d e f g h i j k l m n o p q r"),
    chat("bad", ""),
    "{not json",
    chat("What?", "four"),
    chat("What?", "four"),
]


@pytest.fixture
def counted(monkeypatch):
    """The files that were really tokenized."""
    calls = []

    def count(path, *args, **kwargs):
        calls.append(Path(path).name)
        return tokenize(path, *args, **kwargs)

    monkeypatch.setattr(tokens, "tokenize", count)
    return calls


@pytest.fixture
def read(bases, tmp_path):
    """Read a file through the store; `read.said` has its warnings."""
    tokenizer, said = load_tokenizer(bases["llama"]), []

    def call(path, *, folder=bases["llama"], max_length=64, rule="skip", limit=1 << 30):
        cache = DiskCache(tmp_path / "cache" / "tokens", limit, said.append)
        data = tokens.load_cached(path, tokenizer, folder=folder, cache=cache, max_length=max_length)
        refuse(data, rule, "data.training")
        return data

    call.said, call.tokenizer = said, tokenizer  # type: ignore[attr-defined]
    return call


def same(one, two):
    rows = zip(one.samples, two.samples, strict=True)
    assert all(a.line == b.line and torch.equal(a.ids, b.ids) and torch.equal(a.trained, b.trained) for a, b in rows)
    assert {a.ids.dtype for a in two.samples} == {torch.int32}
    for name in ("sha256", "rows", "truncated", "problems", "warnings", "remarks"):
        assert getattr(one, name) == getattr(two, name)


def test_the_second_run_reads_what_the_first_tokenized(read, counted, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", MIXED)
    first, second = read(path, max_length=40), read(path, max_length=40)
    assert counted == ["rows.jsonl"]
    assert first.truncated == 1 and first.problems and first.warnings
    same(first, second)
    same(load(path, read.tokenizer, max_length=40, on_row_error="skip"), second)


def test_the_rows_are_hashed_once(read, rows, monkeypatch):
    hashed, digest = [], tokens.file_sha256

    def count(path):
        hashed.append(Path(path))
        return digest(path)

    for module in (tokens, reader):
        monkeypatch.setattr(module, "file_sha256", count)
    found = read(rows)
    assert hashed.count(Path(rows)) == 1
    assert found.sha256 == digest(rows)


def test_the_verdict_on_bad_rows_is_the_same_from_the_cache(read, counted, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", MIXED)
    read(path, rule="skip")
    with pytest.raises(InvalidTrainingFile) as cached:
        read(path, rule="fail")
    with pytest.raises(InvalidTrainingFile) as fresh:
        load(path, read.tokenizer, max_length=64)
    assert (cached.value.message, cached.value.param) == (fresh.value.message, fresh.value.param)
    assert len(counted) == 1


def test_a_file_without_any_good_row_is_refused_from_the_cache_too(read, counted, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ["{"])
    for _ in range(2):
        with pytest.raises(InvalidTrainingFile, match="1 of 1 rows"):
            read(path)
    assert len(counted) == 1


def test_events_of_a_run_are_the_same_with_and_without_what_was_kept(spec, tmp_path):
    def said():
        events = []
        made = spec(cache=str(tmp_path / "cache"))
        prepared(made, tmp_path / "out", events.append)
        return [event for event in events if not isinstance(event, Tick)]

    assert said() == said()


def test_whatever_shapes_the_tokens_is_in_the_name(read, counted, rows, bases, tmp_path, monkeypatch):
    read(rows)
    read(rows, max_length=32)
    other = tmp_path / "other"
    other.mkdir()
    for file in bases["llama"].iterdir():
        if file.suffix != ".safetensors":
            (other / file.name).write_bytes(file.read_bytes())
    read(rows, folder=other)  # the same files in another place: no miss
    assert len(counted) == 2
    (other / "chat_template.jinja").write_text("{{ 'another' }}")
    read(rows, folder=other)
    (other / TEMPLATES).mkdir()
    (other / TEMPLATES / "tool_use.jinja").write_text("{{ 'for tools' }}")
    read(rows, folder=other)
    more = write_rows(tmp_path / "more.jsonl", [chat("more", "rows")])
    read(more)
    monkeypatch.setattr(tokens, "version", lambda package: "another release")
    read(rows)
    assert len(counted) == 6


def test_a_corrupt_entry_is_made_anew_with_a_warning(read, counted, rows, tmp_path):
    first = read(rows)
    (path,) = (tmp_path / "cache" / "tokens").iterdir()
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    same(first, read(rows))
    same(first, read(rows))
    assert len(counted) == 2
    assert [event.level for event in read.said] == ["warn"]
    assert "tokenized file cannot be read and is made again" in read.said[0].message


def test_words_that_were_changed_in_an_entry_are_noticed(read, counted, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", MIXED)
    first = read(path)
    (entry,) = (tmp_path / "cache" / "tokens").iterdir()
    entry.write_bytes(entry.read_bytes().replace(b"not JSON", b"yes JSON"))
    same(first, read(path))
    assert len(counted) == 2


def test_tokens_and_starts_share_one_limit(read, rows, tmp_path):
    old = tmp_path / "cache" / "init" / "old.safetensors"
    old.parent.mkdir(parents=True)
    old.write_bytes(bytes(7900))
    os.utime(old, (1, 1))
    read(rows, limit=8000)
    assert not old.exists()
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1


def test_without_a_limit_nothing_is_kept(read, counted, rows, tmp_path):
    for _ in range(2):
        read(rows, limit=0)
    assert len(counted) == 2
    assert not (tmp_path / "cache").exists()


READER = """
import sys
from pathlib import Path
from lorainit.model.load import load_tokenizer
from lorainit.runtime.disk_cache import DiskCache
from lorainit.data.tokens import load_cached
folder, rows, cache = map(Path, sys.argv[1:])
def complain(event):
    raise SystemExit(event.message)
tokenizer = load_tokenizer(folder)
for length in [40, 48, 56, 64] * 5:
    kept = DiskCache(cache / "tokens", 6000, complain)
    data = load_cached(rows, tokenizer, folder=folder, cache=kept, max_length=length)
    assert len(data.samples) == 12 and max(len(s.ids) for s in data.samples) <= length
"""


def test_two_processes_that_write_at_once_never_see_half_an_entry(bases, rows, tmp_path):
    running = [Forked([bases["llama"], rows, tmp_path], code=READER) for _ in range(2)]
    errors = [process.communicate(timeout=600)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    assert not [p for p in (tmp_path / "tokens").iterdir() if p.name.startswith(".")]


# --- digests of bases ----------------------------------------------------------------------------


@pytest.fixture
def hashed(monkeypatch):
    calls = []

    def count(folder):
        calls.append(folder)
        return base_sha256(folder)

    monkeypatch.setattr(digest, "base_sha256", count)
    return calls


@pytest.fixture
def base(tmp_path):
    """A folder of weights that were written a while ago, as far as anybody can see."""
    folder = tmp_path / "base"
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture
def known(tmp_path):
    said = []
    cache = DiskCache(tmp_path / "cache" / "bases", 1 << 20, said.append)
    yield lambda folder: cached_sha256(folder, cache)
    assert said == []


def change_a_weight(folder):
    """One bit of one number: still a whole model."""
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)


def test_weights_that_stay_as_they_are_are_hashed_once(base, known, hashed, monkeypatch):
    monkeypatch.setattr(digest, "SETTLED_SECONDS", 0.0)
    assert known(base) == known(base) == base_sha256(base)
    assert len(hashed) == 1


def test_changed_weights_are_hashed_again_even_with_the_old_times(base, known, hashed, monkeypatch):
    monkeypatch.setattr(digest, "SETTLED_SECONDS", 0.0)
    before = known(base)
    file = base / "model.safetensors"
    facts = file.stat()
    change_a_weight(base)
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert known(base) != before
    assert len(hashed) == 2


def test_weights_written_just_now_are_not_remembered(base, known, hashed):
    for file in base.glob("*.safetensors"):
        assert time.time() - file.stat().st_ctime < digest.SETTLED_SECONDS
    known(base)
    known(base)
    assert len(hashed) == 2


def test_a_conversion_that_is_not_what_was_written_is_refused(base):
    write_digest(base)
    require_whole(base, base_sha256(base))
    with pytest.raises(UnsupportedModel, match="delete it from the model cache"):
        require_whole(base, "0" * 64)


def test_a_base_whose_weights_changed_since_it_was_inspected_is_refused(spec, llama, tmp_path):
    promised = {"source": str(llama), "sha256": base_sha256(llama)}
    open_base(spec(model=promised), tmp_path / "out", lambda event: None)
    change_a_weight(llama)
    with pytest.raises(UnsupportedModel, match="inspect the model again"):
        open_base(spec(model=promised), tmp_path / "out", lambda event: None)


def test_a_folder_of_somebody_elses_promises_nothing(base):
    require_whole(base, "0" * 64)


def test_a_run_refuses_a_damaged_conversion(spec, bases, base, tmp_path):
    for file in bases["llama"].iterdir():
        if not (base / file.name).exists():
            (base / file.name).write_bytes(file.read_bytes())
    write_digest(base)
    change_a_weight(base)
    with pytest.raises(UnsupportedModel, match="is not what was written"):
        open_base(spec(model={"source": str(base)}), tmp_path / "out", lambda event: None)


def test_store_says_what_could_not_be_kept(tmp_path, monkeypatch):
    from lorainit.runtime import disk_cache as store_module

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    said = []
    monkeypatch.setattr(store_module, "save_file", fail)
    DiskCache(tmp_path / "tokens", 1000, said.append).write("k", {"a": 1})
    assert [(type(e), e.level) for e in said] == [(Message, "warn")]
    assert "tokenized file could not be cached" in said[0].message
    assert json.dumps(said[0].data) == '{"kind": "data"}'
