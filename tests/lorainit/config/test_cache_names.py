"""What entries of the cache are called, and what a name says."""

import pytest

from lorainit.config.cache_names import SourceRows, entry_name, is_without_rows, parse_rows
from lorainit.data.dataset import file_sha256
from lorainit.init.stage import start
from tests.lorainit.contexts import prepared

A, B = "a" * 64, "b" * 64


@pytest.mark.parametrize("name", ["{}.safetensors", ".{}-0123456789abcdef"])
def test_a_name_says_whose_rows_an_entry_was_made_of(name):
    made = name.format(entry_name("k" * 40, owner="proj_1", files=[B, A, B]))
    assert parse_rows(made) == SourceRows("proj_1", (A, B))
    assert not is_without_rows(made)
    alone = name.format(entry_name("k" * 40, owner="proj_1", files=[]))
    assert parse_rows(alone) is None
    assert is_without_rows(alone)


def test_a_name_of_the_longest_owner_and_two_files_fits_a_file_system():
    assert len(f".{entry_name('k' * 40, owner='o' * 40, files=[A, B])}-0123456789abcdef") <= 255


@pytest.fixture
def kept(spec, rows, tmp_path):
    """What a run of this owner, with this method, leaves in the cache: the names by folder."""

    def begin(init, owner, **data):
        made = spec(lora={"init": init, "r": 2}, data={"owner": owner, **data}, cache=str(tmp_path / "cache"))
        job = prepared(made, tmp_path / "out")
        summary = start(job).summary
        folders = (tmp_path / "cache" / kind for kind in ("tokens", "init"))
        return summary, [{path.name for path in folder.iterdir()} if folder.exists() else set() for folder in folders]

    return begin


GRADIENT = {"method": "lora_ga", "samples": 4}


def test_tokens_and_evidence_are_named_after_their_owner_and_their_file(kept, rows):
    _, (tokens, starts) = kept(GRADIENT, "proj_1")
    assert {parse_rows(name) for name in tokens | starts} == {SourceRows("proj_1", (file_sha256(rows),))}


def test_owners_share_nothing(kept):
    assert kept(GRADIENT, "proj_1")[0]["cached"] is False
    assert kept(GRADIENT, "proj_1")[0]["cached"] is True
    summary, (tokens, starts) = kept(GRADIENT, "proj_2")
    assert summary["cached"] is False
    assert (len(tokens), len(starts)) == (2, 2)


def test_evidence_is_named_after_the_file_that_was_looked_at(kept, rows, tmp_path):
    calibration = tmp_path / "calibration.jsonl"
    calibration.write_bytes(b"\n".join(rows.read_bytes().splitlines()[:6]) + b"\n")
    looked_at, trained_on = file_sha256(calibration), file_sha256(rows)
    _, (_, starts) = kept(GRADIENT, "p", calibration=str(calibration))
    assert {parse_rows(name).files for name in starts} == {(looked_at,)}
    preheat = {"method": "hrp"}
    _, (_, more) = kept(preheat, "p", calibration=str(calibration))
    assert {parse_rows(name).files for name in more - starts} == {tuple(sorted((looked_at, trained_on)))}


def test_a_start_that_looks_at_no_rows_belongs_to_everybody(kept, monkeypatch):
    monkeypatch.setattr("lorainit.init.stage.WORTH_KEEPING_SECONDS", 0.0)
    _, (_, starts) = kept({"method": "pissa", "niter": None}, "proj_1")
    assert starts and all(map(is_without_rows, starts))
    assert kept({"method": "pissa", "niter": None}, "proj_2")[0]["cached"] is True
