"""What a run that goes on keeps of how its steps are cut into passes, and what it decides anew."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from lorainit.config.errors import CheckpointMismatch
from lorainit.context import RunRequest
from lorainit.data.batches import Budget, split_into_batches
from lorainit.data.dataset import Sample
from lorainit.model import passes
from lorainit.model.passes import go_on
from lorainit.run import run, run_together
from lorainit.runtime.distributed.world import SINGLE_PROCESS, World

pytestmark = pytest.mark.usefixtures("training_only")

ROWS, TOKENS = 8, 2048  # on a CPU, where nobody says


def base(*, rows="packed", parts=1):
    return SimpleNamespace(
        device=torch.device("cpu"),
        layout=SimpleNamespace(rows=rows),
        sharded="it is large" if parts > 1 else "",
        world=World(0, parts) if parts > 1 else SINGLE_PROCESS,
    )


def asking(rows=None, tokens=None):
    return SimpleNamespace(micro_batch_size=rows, tokens_per_pass=tokens)


def after(known=None, *, asked=None, at=None, sharing=1):
    """The passes of a run, and of one that goes on where there is something known."""
    found = known and json.loads(known.model_dump_json(exclude={"kept"}))
    return go_on(asked or asking(), at or base(), found, batch_size=16, sharing=sharing)


def short_of_memory(known, **changes):
    return known.model_copy(update={"tokens": 300, **changes})


def test_what_memory_decided_is_kept():
    going_on = after(short_of_memory(after(), recomputed=True))
    assert (going_on.rows, going_on.tokens, going_on.recomputed, going_on.kept) == (ROWS, 300, True, True)
    again = after(going_on)
    assert (again.tokens, again.kept) == (300, True)


def test_a_spec_that_asks_for_the_same_keeps_it_too():
    first = after(asked=asking(4, 1000))
    assert after(short_of_memory(first), asked=asking(4, 1000)).tokens == 300


def test_a_spec_with_the_autos_of_the_first_run_filled_in_keeps_it():
    assert after(short_of_memory(after()), asked=asking(ROWS, TOKENS)).tokens == 300


@pytest.mark.parametrize(
    ("asked", "wanted"), [(asking(None, 500), (ROWS, 500)), (asking(2, None), (2, TOKENS)), (asking(2, 99), (2, 99))]
)
def test_what_is_asked_for_counts_before_what_was(asked, wanted):
    going_on = after(short_of_memory(after(), recomputed=True), asked=asked)
    assert (going_on.rows, going_on.tokens, going_on.recomputed, going_on.kept) == (*wanted, False, False)


def test_what_was_asked_for_is_kept_where_nobody_says_otherwise():
    known = after(asked=asking(2, 900))
    assert (after(known).rows, after(known).tokens) == (2, 900)
    other = after(known, asked=asking(None, 600))
    assert (other.rows, other.tokens, other.kept) == (2, 600, False)


SHARING = pytest.mark.parametrize(("before", "now"), [(3, 1), (1, 3), (3, 2)])


@SHARING
def test_on_a_gpu_another_number_of_runs_that_share_a_pass_share_its_tokens_anew(monkeypatch, before, now):
    monkeypatch.setattr(passes.devices, "name_and_memory", lambda _: ("A", 80_000))
    going_on = after(short_of_memory(after(sharing=before)), sharing=now)
    assert (going_on.tokens, going_on.kept) == (TOKENS // now, False)


@SHARING
def test_on_a_cpu_a_run_that_leaves_or_joins_a_group_keeps_its_tokens(before, now):
    """Bits are promised there."""
    first = after(sharing=before)
    assert first.tokens == TOKENS // before
    assert after(first, sharing=now).tokens == first.tokens


@pytest.mark.parametrize(
    ("device", "kept"),
    [(("A", 80_000), True), (("A", 79_600), True), (("A", 40_000), False), (("A", 160_000), False),
     (("B", 80_000), False)],
)  # fmt: skip
def test_another_device_is_asked_for_its_memory_and_another_driver_is_not(monkeypatch, device, kept):
    monkeypatch.setattr(passes.devices, "name_and_memory", lambda _: ("A", 80_000))
    known = short_of_memory(after())
    monkeypatch.setattr(passes.devices, "name_and_memory", lambda _: device)
    assert (after(known).tokens, after(known).kept) == ((300, True) if kept else (TOKENS, False))


def test_a_base_that_is_divided_otherwise_leaves_other_room(monkeypatch):
    monkeypatch.setattr(World, "any_rank", lambda self, flag, device: flag)
    known = short_of_memory(after(at=base(parts=4)))
    assert after(known, at=base(parts=2)).kept is False
    assert after(known, at=base(parts=4)).kept is True


def test_one_process_on_another_device_makes_all_decide_anew(monkeypatch):
    known = after(at=base(parts=2))
    monkeypatch.setattr(World, "any_rank", lambda self, flag, device: True)
    assert after(known, at=base(parts=2)).kept is False


@pytest.mark.parametrize("batch", [5, 8, 16])
@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.parametrize("divided", [False, True])
def test_a_step_has_a_pass_for_each_of_several_devices(batch, devices, divided):
    at = base(parts=devices)
    at.sharded = at.sharded if divided else ""
    found = go_on(asking(), at, None, batch_size=batch, sharing=1)
    rows = [Sample(n, torch.ones(3), torch.ones(3, dtype=torch.bool)) for n in range(batch)]
    pieces = split_into_batches(rows, Budget(found.rows, found.tokens))
    assert all(pieces[World(rank, devices).share] for rank in range(devices))
    assert len(pieces) == devices


def test_whoever_asks_for_more_rows_in_a_pass_gets_them_on_several_devices_too():
    assert go_on(asking(5), base(parts=2), None, batch_size=5, sharing=1).rows == 5


def test_rows_that_go_one_by_one_do_so_whatever_is_asked():
    assert after(asked=asking(4), at=base(rows="one by one")).rows == 1


def test_a_checkpoint_without_a_word_of_its_passes_has_those_of_a_start():
    assert go_on(asking(), base(), None, batch_size=3, sharing=1).rows == 3


def test_passes_that_cannot_be_read_are_refused():
    with pytest.raises(CheckpointMismatch, match="passes") as caught:
        go_on(asking(), base(), {"rows": "many"}, batch_size=3, sharing=1)
    assert caught.value.param == "resume_from"


# --- whole runs ------------------------------------------------------------------------------------

DROPOUT = {"lora": {"init": "kaiming", "dropout": 0.2}, "training": {"batch_size": 5, "checkpoint_interval": 2}}


def factors(out):
    return load_file(out / "adapter" / "adapter_model.safetensors")


def test_a_run_that_goes_on_drops_what_it_would_have_dropped_without_being_told_its_passes_again(spec, tmp_path):
    run(spec(**DROPOUT, micro_batch_size=2), tmp_path / "whole", lambda event: None)
    point = str(tmp_path / "whole/checkpoints/step-000002")
    done = run(spec(**DROPOUT, resume_from=point), tmp_path / "rest", lambda event: None)
    assert done.resources["micro_batch_size"] == 2
    whole = factors(tmp_path / "whole")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in factors(tmp_path / "rest").items())


def test_a_run_that_goes_on_says_in_its_manifest_what_it_kept_and_what_was_asked_anew(spec, tmp_path):
    run(spec(micro_batch_size=2), tmp_path / "first", lambda event: None)
    point = str(tmp_path / "first/checkpoints/step-000002")
    done = run(spec(tokens_per_pass=77, resume_from=point), tmp_path / "rest", lambda event: None)
    manifest = json.loads((tmp_path / "rest/adapter/manifest.json").read_text())
    assert manifest["passes"]["asked"] == {"rows": 2, "tokens": 77}
    assert [manifest["plan"][n] for n in ("micro_batch_size", "tokens_per_pass")] == [2, 77]
    assert (done.resources["micro_batch_size"], done.resources["tokens_per_pass"]) == (2, 77)


def test_a_member_of_a_group_that_goes_on_alone_on_a_cpu_ends_with_the_bits_of_the_group(spec, tmp_path):
    specs = [spec("wide-llama", **DROPOUT, tokens_per_pass=240, seed=seed) for seed in range(3)]
    ends = dict(run_together([RunRequest(s, tmp_path / f"{n}", lambda event: None) for n, s in enumerate(specs)]))
    assert ends[0].resources["gradient_accumulation_steps"] > 1
    point = str(tmp_path / "0/checkpoints/step-000002")
    run(specs[0].model_copy(update={"resume_from": point}), tmp_path / "alone", lambda event: None)
    group = factors(tmp_path / "0")
    assert all(torch.equal(tensor, group[name]) for name, tensor in factors(tmp_path / "alone").items())
