"""What is tried before the first step is as large as what comes, and leaves nothing behind."""

import json
import weakref
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lorainit.config.events import Plan
from lorainit.config.spec import Hyperparameters
from lorainit.data.batches import Budget
from lorainit.data.dataset import Sample
from lorainit.data.largest import Rows
from lorainit.model.layers.factors import Factors
from lorainit.model.layers.layer import LoRALinear
from lorainit.run import run
from lorainit.runtime.distributed.world import World
from lorainit.train import dry_run, optimizers
from tests.lorainit.contexts import run_of
from tests.lorainit.shortage import Memory, adapter

pytestmark = pytest.mark.usefixtures("training_only")


def test_validation_rows_like_those_of_training_are_not_tried_beside_them():
    def rows_of(*lengths):
        data, valid = (
            Rows([Sample(1, torch.arange(n), torch.ones(n, dtype=torch.bool)) for n in some], 2) for some in lengths
        )
        budget = Budget(2, 100, packed=True)
        return SimpleNamespace(
            valid=valid,
            training_budget=budget,
            largest_pass=lambda: data.largest_pass(budget),
            largest_evaluation=lambda: valid.largest_pass(budget),
        )

    for lengths, tried in (([[20, 30, 40], [30, 30]], 1), ([[20, 30, 40], [60]], 2), ([[20, 30, 40], [35, 36]], 2)):
        assert len(list(dry_run.plan_dry_runs([rows_of(*lengths)]))) == tried


def test_the_trial_leaves_room_for_what_the_optimizer_will_hold(wanted, tmp_path, monkeypatch):
    """AdamW's moments come with the first step, twice what is trained: a trial without them fits where no step does."""
    held, seen, make = weakref.WeakSet(), [], torch.empty_like

    def noted(tensor, **how):
        held.add(made := make(tensor, **how))
        return made

    memory = Memory(monkeypatch)
    memory.allocate = lambda *_, **__: seen.append(sum(t.numel() for t in held)) if torch.is_grad_enabled() else None
    monkeypatch.setattr(dry_run.torch, "empty_like", noted)
    heard = []
    run(wanted(lora={"init": "kaiming"}), tmp_path / "out", heard.append)
    plan = next(event for event in heard if isinstance(event, Plan))
    assert seen[0] >= 2 * plan.trainable_parameters


# --- an update ------------------------------------------------------------------------------------

OPTIMIZERS = [
    {"name": "adamw"},
    {"name": "adamw_lora_plus", "ratio": 16},
    {"name": "adamw_preconditioned"},
    {"name": "adamw_preconditioned", "update": "simultaneous"},
]


def member(optimizer, *, dora=False):
    """One layer of an adapter, with a zero of either sign in a factor."""
    factors = Factors(A=torch.randn(4, 16), B=torch.randn(24, 4))
    factors.B[0, 0], factors.B[0, 1] = -0.0, 0.0
    layer = LoRALinear(nn.Linear(16, 24).requires_grad_(False), factors, scale=1.0, subtract=False, dora=dora)
    recipe = Hyperparameters(optimizer=optimizer, learning_rate=1.0, weight_decay=0.1)
    return run_of(None, {}, None, None, training=recipe, size=1, layers={"layer": layer})


def bits(members):
    return [p.detach().view(torch.int32).clone() for one in members for p in one.parameters]


def same(one, two):
    return len(one) == len(two) and all(map(torch.equal, one, two))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_an_update_that_is_tried_leaves_every_bit_as_it_was(optimizer, dora):
    members = [member(optimizer, dora=dora), member({"name": "adamw"})]
    before, chance = bits(members), torch.get_rng_state()
    dry_run.try_update(members)
    assert same(bits(members), before)
    assert torch.equal(torch.get_rng_state(), chance)
    assert all(parameter.grad is None for one in members for parameter in one.parameters)


def test_an_update_that_runs_out_of_memory_leaves_every_bit_as_it_was_too(monkeypatch):
    (one,) = members = [member({"name": "adamw_preconditioned"})]
    before, inverses = bits(members), optimizers._inverses
    calls = iter(range(10))

    def short(*args):
        if next(calls) == 1:  # A has been moved by then
            assert not same(bits(members), before)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return inverses(*args)

    monkeypatch.setattr(optimizers, "_inverses", short)
    with pytest.raises(torch.OutOfMemoryError):
        dry_run.try_update(members)
    assert same(bits(members), before)
    assert one.parameters[0].grad is None


def test_factors_that_an_optimizer_refuses_are_left_to_the_first_step():
    singular = member({"name": "adamw_preconditioned", "damping": 0.0})
    with torch.no_grad():
        singular.layers["layer"].B.zero_()
    dry_run.try_update([singular])


def test_an_update_is_tried_with_everybodys_state_and_gradients(monkeypatch):
    """As in most steps of a run, and not only in the first one, which makes the state on the way."""
    members, seen = [member({"name": "adamw"}) for _ in range(3)], []
    step = torch.optim.AdamW.step

    def noted(self, *args):
        with_gradients = sum(p.grad is not None for one in members for p in one.parameters)
        seen.append((with_gradients, len(self.state)))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    dry_run.try_update(members)
    assert seen == [(6, 0), (4, 0), (2, 0), (6, 2), (4, 2), (2, 2)]


def test_the_sum_over_several_devices_is_tried_in_one_piece(monkeypatch):
    pieces, cat = [], torch.cat
    monkeypatch.setattr(dry_run.torch, "cat", lambda some: pieces.append(sum(t.numel() for t in some)) or cat(some))
    one = member({"name": "adamw"})
    one.base.world = World(0, 2)
    dry_run.try_update([one])
    assert pieces == [sum(p.numel() for p in one.parameters)] * 2


# --- what a run is like after it ------------------------------------------------------------------


def numbers(folder):
    """All that a run leaves: each checkpoint's tensors, and its log without times."""
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in line.items() if "second" not in k} for line in logged]
    return {path.parent.name: load_file(path) for path in folder.glob("checkpoints/*/state.safetensors")}, timeless


@pytest.mark.parametrize(
    "optimizer",
    [pytest.param(o, marks=() if o["name"] == "adamw" or "update" in o else pytest.mark.slow) for o in OPTIMIZERS],
    ids=str,
)
def test_a_run_ends_with_the_bits_that_it_has_without_a_try(wanted, rows, tmp_path, monkeypatch, optimizer):
    one = wanted(
        lora={"init": "kaiming", "dropout": 0.2},
        data={"validation": str(rows)},
        training={"batch_size": 4, "optimizer": optimizer},
        micro_batch_size=2,
    )
    tried = run(one, tmp_path / "tried", lambda event: None)
    monkeypatch.setattr("lorainit.run.fit_to_memory", lambda runs: None)
    plain = run(one, tmp_path / "plain", lambda event: None)
    assert same(list(adapter(tried).values()), list(adapter(plain).values()))
    (ours, log), (theirs, other) = numbers(tmp_path / "tried"), numbers(tmp_path / "plain")
    assert log == other
    assert ours.keys() == theirs.keys() == {"step-000002", "step-000004"}
    for step, tensors in ours.items():
        assert tensors.keys() == theirs[step].keys()
        assert all(torch.equal(tensor, theirs[step][name]) for name, tensor in tensors.items())
