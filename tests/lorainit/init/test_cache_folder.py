"""The folder that keeps evidence and starts: what comes back, what is driven out, and who may share it."""

import os
import time

import pytest
import torch

from lorainit.init.cache import Cache, data_digest
from lorainit.init.evidence import Evidence, StepSearch
from lorainit.init.initialize import CachedStart
from lorainit.model.layers.factors import Factors
from lorainit.runtime.disk_cache import DiskCache, make_key
from tests.lorainit.forked import Forked


def entry(size, fill=0.0):
    return {"layer": Evidence(gradient=torch.full((size // 4,), fill))}


@pytest.fixture
def store(tmp_path):
    events = []
    made = Cache(DiskCache(tmp_path / "init", 10_000, events.append))
    yield made
    assert events == []


def names(store):
    return sorted(p.stem for p in store.entries.folder.iterdir())


def test_every_field_of_evidence_comes_back(store):
    shared = torch.eye(3)
    step = StepSearch(gamma=4.0, base_loss=1.5, tried=((16.0, 1.4), (4.0, 1.25)))
    given = {
        "a": Evidence(second_moment=shared, rank=0, facts={"explained": [0.5, 0.25]}, rows=3),
        "b": Evidence(second_moment=shared, preheated=(torch.ones(2, 3), torch.arange(4.0)[::2]), step=step),
    }
    store.keep_evidence("k", given)
    found = store.read_evidence("k")
    assert found["b"].step == step
    assert (found["a"].rank, found["a"].rows, found["a"].facts) == (0, 3, {"explained": [0.5, 0.25]})
    assert found["a"].second_moment is found["b"].second_moment  # stored once
    assert torch.equal(found["b"].preheated[0], torch.ones(2, 3))
    assert found["b"].preheated[1].tolist() == [0.0, 2.0]
    assert found["a"].gradient is None
    assert store.read_evidence("other") is None


def test_starts_come_back(store):
    given = {"a": CachedStart(Factors(A=torch.ones(1, 2), B=torch.zeros(2, 1)), {"name": "a", "rank": 1, "scale": 0.1})}
    store.keep_starts("k", given)
    found = store.read_starts("k")
    assert found["a"].facts == given["a"].facts
    assert torch.equal(found["a"].factors.A, given["a"].factors.A)


def test_the_least_recently_used_go_first(store):
    for number, name in enumerate("abc"):
        store.keep_evidence(name, entry(2500))
        os.utime(store.entries.folder / f"{name}.safetensors", (1000 + number, 1000 + number))
    store.read_evidence("a")
    store.keep_evidence("d", entry(2500))
    assert names(store) == ["a", "c", "d"]
    assert sum(p.stat().st_size for p in store.entries.folder.iterdir()) <= store.entries.limit


def test_an_entry_above_the_limit_is_not_kept_and_drives_none_out(store):
    store.keep_evidence("a", entry(4000))
    store.keep_evidence("b", entry(12_000))
    assert names(store) == ["a"]


def test_what_a_crashed_writer_left_goes_after_an_hour(store):
    store.keep_evidence("a", entry(40))
    old, new = store.entries.folder / ".a-old", store.entries.folder / ".a-new"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 4000,) * 2)
    store.keep_evidence("b", entry(40))
    assert not old.exists()
    assert new.exists()


def test_an_entry_that_is_evicted_while_it_is_read_stays_readable(store):
    store.keep_evidence("a", entry(4000, 3.0))
    found = store.read_evidence("a")
    (store.entries.folder / "a.safetensors").unlink()
    assert float(found["layer"].gradient.sum()) == 3000.0


WRITER = """
import sys, torch
from pathlib import Path
from lorainit.init.cache import Cache
from lorainit.init.evidence import Evidence
from lorainit.runtime.disk_cache import DiskCache
def complain(event):
    raise SystemExit(event.message)
store = Cache(DiskCache(Path(sys.argv[1]), 30_000, complain))
for turn in range(60):
    name = "abcde"[(turn + int(sys.argv[2])) % 5]
    found = store.read_evidence(name)
    if found is not None:
        assert found["layer"].gradient.eq(ord(name)).all()
    store.keep_evidence(name, {"layer": Evidence(gradient=torch.full((2000,), float(ord(name))))})
"""


def test_workers_that_share_a_folder_never_see_half_an_entry(tmp_path):
    running = [Forked([tmp_path / "init", n], code=WRITER) for n in range(3)]
    errors = [process.communicate(timeout=600)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], errors
    left = list((tmp_path / "init").iterdir())
    assert not [p for p in left if p.name.startswith(".")]
    assert sum(p.stat().st_size for p in left) <= 30_000


def test_names_depend_on_every_part():
    assert make_key(a=1) == make_key(a=1)
    assert make_key(a=1) != make_key(a=2) != make_key(a=1, b=None)


def test_digest_of_rows_sees_tokens_masks_and_borders():
    from lorainit.data.dataset import Sample

    def rows(*pairs):
        return [Sample(1, torch.tensor(ids), torch.tensor(mask)) for ids, mask in pairs]

    one = rows(([1, 2], [False, True]), ([3], [True]))
    others = [
        rows(([1, 2], [True, True]), ([3], [True])),
        rows(([1, 4], [False, True]), ([3], [True])),
        rows(([1, 2, 3], [False, True, True])),
    ]
    assert len({data_digest(found) for found in [one, *others]}) == 4
