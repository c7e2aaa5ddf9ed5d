"""Several runs in one forward pass: each ends with the very bits it would have had alone.

On bases whose layers are as wide as real ones in one respect, a multiple of the processor's vectors: torch's
SiLU rounds the numbers at the end of a tensor, which fill no vector, in another way.
"""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorainit.config.errors import Dropped, GroupMismatch, InvalidTrainingFile, LorainitError, NonFiniteLoss
from lorainit.config.events import Checkpoint, Done, Metrics
from lorainit.context import RunRequest
from lorainit.data.batches import pack
from lorainit.data.reader import load
from lorainit.model.forward.loss import sum_losses, sum_losses_by_adapter
from lorainit.model.layers import group
from lorainit.model.layers.factors import Factors
from lorainit.model.layers.layer import LoRALinear
from lorainit.model.load import load_model
from lorainit.model.targets.targets import find_targets
from lorainit.run import run, run_together
from tests.lorainit.conftest import chat, make_tokenizer, only_training, write_rows

pytestmark = pytest.mark.usefixtures("training_only")

ALIKE = {"micro_batch_size": 2}
# As unlike as members may be: method, rank, scale, targets, seed, rows, rate, decay, steps, dropout, DoRA, optimizer.
UNLIKE = {
    "loram, preconditioned": {
        "lora": {"init": "loram", "r": 4},
        "training": {"optimizer": {"name": "adamw_preconditioned", "damping": 1e-4}},
    },
    "pissa, seed": {"lora": {"init": "pissa", "r": 8, "alpha": 3.0}, "seed": 5},
    "lora_ga, decay": {
        "lora": {"init": {"method": "lora_ga", "samples": 4}},
        "training": {"weight_decay": 0.1, "learning_rate": 3e-3, "max_steps": 6},
    },
    "eva, few targets": {
        "lora": {"init": {"method": "eva", "samples": 4}, "r": 2, "dropout": 0.2, "target_modules": "attention"},
        "training": {"max_steps": 2},
    },
}
KAIMING = {"lora": {"init": "kaiming", "r": 2, "dropout": 0.2, "target_modules": "attention"}}


def together(specs, folder, listen=None):
    """Run specs as a group: how each ended, and its events."""
    events = [[] for _ in specs]
    heard = listen or (lambda who, event: None)

    def listener(who):
        def on_event(event):
            heard(who, event)
            events[who].append(event)

        return on_event

    requests = [RunRequest(spec, folder / str(who), listener(who)) for who, spec in enumerate(specs)]
    ends = dict(run_together(requests))
    assert sorted(ends) == list(range(len(specs)))
    return ends, events


def factors(end):
    return load_file(f"{end.adapter}/adapter_model.safetensors")


def same_adapter(one, two):
    a, b = factors(one), factors(two)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(events):
    return [(e.step, e.train_loss, e.grad_norm, e.full_valid_loss) for e in events if isinstance(e, Metrics)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """How a run ends alone; each is run once."""
    ends = {}

    def end_of(spec):
        key = spec.model_dump_json()
        if key not in ends:
            with only_training():
                ends[key] = run(spec, tmp_path_factory.mktemp("alone"), lambda event: None)
        return ends[key]

    return end_of


@pytest.fixture(scope="module")
def unlike(spec, rows, tmp_path_factory):
    """Members as unlike as may be: their specs, how they ended, their events, and all events in their order.

    One learns from rows of its own.
    """
    folder = tmp_path_factory.mktemp("unlike")
    other = [chat(f"Count {i}", "one two three " * (1 + i % 3)) for i in range(9)]
    specs = [spec("wide-llama", **ALIKE, data={"validation": str(rows)}, **change) for change in UNLIKE.values()]
    data = specs[1].data.model_copy(update={"training": str(write_rows(folder / "other.jsonl", other))})
    specs[1] = specs[1].model_copy(update={"data": data})
    order = []
    with only_training():
        ends, events = together(specs, folder, lambda who, event: order.append((who, type(event), step_of(event))))
    return specs, ends, events, order


def step_of(event):
    return getattr(event, "step", None)


@pytest.mark.parametrize("who", range(len(UNLIKE)), ids=list(UNLIKE))
def test_every_member_ends_with_the_bits_it_has_alone(unlike, who, tmp_path):
    specs, ends, events, _ = unlike
    heard = []
    solo = run(specs[who], tmp_path, heard.append)
    assert losses(events[who]) == losses(heard)
    assert len(losses(heard)) > 2
    assert same_adapter(ends[who], solo)
    assert ends[who].export_check["passed"]
    assert events[who][-1] == ends[who]


def test_who_has_fewer_steps_is_done_while_the_others_train(unlike):
    *_, order = unlike
    assert order.index((3, Done, None)) < order.index((0, Metrics, 3))


@pytest.mark.parametrize(
    "specs",
    [
        [{"base": "wide-gpt2", **change} for change in (KAIMING, UNLIKE["pissa, seed"])],
        [{"base": "wide-llama", "lora": {"init": "kaiming", "use_dora": True}}, {"base": "wide-llama"}],
        pytest.param([{"base": "wide-gpt2", **change} for change in UNLIKE.values()], marks=pytest.mark.slow),
    ],
    ids=["gpt2", "dora", "gpt2, unlike"],
)
def test_where_sums_are_formed_in_another_order_members_end_close(spec, alone, tmp_path, specs):
    """GPT-2's layers, and DoRA, whose rows go alone."""
    specs = [spec(**{**ALIKE, **change}) for change in specs]
    ends, _ = together(specs, tmp_path / "group")
    for who, one in enumerate(specs):
        two = factors(alone(one))
        for name, tensor in factors(ends[who]).items():
            assert torch.allclose(tensor, two[name], atol=2e-6), name


def test_a_member_goes_on_from_its_own_checkpoint(spec, alone, tmp_path):
    """One resumes at step 2, the other starts: both end as if never disturbed."""
    one, two = spec("wide-llama", **ALIKE), spec("wide-llama", **ALIKE, seed=1)
    checkpoint = Path(alone(one).adapter).parent / "checkpoints" / "step-000002"
    ends, events = together([one.model_copy(update={"resume_from": str(checkpoint)}), two], tmp_path / "group")
    assert [e.step for e in events[0] if isinstance(e, Checkpoint)] == [4]
    assert same_adapter(ends[0], alone(one))
    assert same_adapter(ends[1], alone(two))


# --- what one does wrong -------------------------------------------------------------------------


def poison(who, step, field="A"):
    """A listener that spoils a member's factors after a step of its own."""
    seen = []

    def listen(member, event):
        if member == who and isinstance(event, Metrics) and event.step == step:
            seen.append(event)
            layer = next(layer for layer in alive[who].values())
            with torch.no_grad():
                getattr(layer, field)[0, 0] = float("nan")

    alive = {}
    listen.alive, listen.seen = alive, seen  # type: ignore[attr-defined]
    return listen


@pytest.mark.parametrize(
    ("precision", "field"),
    [("fp32", "B"), ("bf16", "A"), ("bf16", "B"), pytest.param("fp32", "A", marks=pytest.mark.slow)],
)
def test_one_poisoned_adapter_ends_and_the_others_never_notice(spec, alone, tmp_path, monkeypatch, precision, field):
    """In bf16 all adapters stand in one product, where 0·NaN would reach everybody's rows."""
    listen = poison(1, step=2, field=field)
    from lorainit.train import loop as module

    trainer = module.AdapterTrainer

    def remember(its_run, **given):
        listen.alive[len(listen.alive)] = its_run.layers
        return trainer(its_run, **given)

    specs = [spec("wide-llama", **ALIKE, seed=seed, training={"precision": precision}) for seed in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr(module, "AdapterTrainer", remember)
        ends, _ = together(specs, tmp_path / "group", listen)
    assert listen.seen
    assert isinstance(ends[1], NonFiniteLoss)
    assert ends[1].message.startswith("Step 3: ")
    for who in (0, 2):
        solo = alone(specs[who])
        if precision == "fp32":
            assert same_adapter(ends[who], solo)
        else:
            one, two = factors(ends[who]), factors(solo)
            assert all(torch.allclose(one[name], two[name], atol=2e-3) for name in one)


def test_a_member_whose_file_is_bad_fails_before_the_others_train(spec, tmp_path):
    bad = write_rows(tmp_path / "bad.jsonl", ["{"])
    ends, events = together(
        [spec("wide-llama", **ALIKE), spec("wide-llama", **ALIKE, data={"training": str(bad)})], tmp_path
    )
    assert isinstance(ends[1], InvalidTrainingFile)
    assert isinstance(ends[0], Done)
    assert not losses(events[1])


def test_a_dropped_member_costs_the_others_nothing(spec, alone, tmp_path):
    def drop(who, event):
        if who == 0 and isinstance(event, Metrics) and event.step == 2:
            raise Dropped("Nobody waits for it.")

    specs = [spec("wide-llama", **ALIKE), spec("wide-llama", **ALIKE, seed=1)]
    ends, _ = together(specs, tmp_path / "group", drop)
    assert isinstance(ends[0], Dropped)
    assert same_adapter(ends[1], alone(specs[1]))


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"base": "wide-gpt2"}, "model"),
        ({"training": {"precision": "bf16"}}, "precision"),
        ({"deterministic": False}, "deterministic"),
    ],
)
def test_who_cannot_share_the_pass_is_told_why(spec, tmp_path, change, param):
    ends, _ = together([spec("wide-llama", **ALIKE), spec(**{"base": "wide-llama", **ALIKE, **change})], tmp_path)
    assert isinstance(ends[0], Done)
    assert isinstance(ends[1], GroupMismatch)
    assert ends[1].param == param
    assert "cannot share a forward pass" in ends[1].message


def test_a_base_that_cannot_pack_refuses_groups(spec, tmp_path, monkeypatch):
    from lorainit.model.forward import attention

    def strange(*_args, **_named):
        raise attention.UnsupportedAttention("its attention is strange")

    monkeypatch.setattr(attention._Rows, "apply", strange)
    ends, _ = together([spec("wide-llama", **ALIKE), spec("wide-llama", **ALIKE)], tmp_path)
    assert all(isinstance(end, LorainitError) and end.param == "member" for end in ends.values())


# --- gradients -----------------------------------------------------------------------------------


def adapter(model, seed, r):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, module in find_targets(model, "all-linear").items():
        n, m = module.in_features, module.out_features
        pair = Factors(torch.randn(r, n, generator=generator) / 8, torch.randn(m, r, generator=generator) / 8)
        found[name] = LoRALinear(module, pair, scale=1.5, subtract=seed % 2 == 1)
        with torch.no_grad():
            found[name].B += torch.randn(m, r, generator=generator) / 16
    return found


def gradients(layers):
    return [p.grad.clone() for layer in layers.values() for p in layer.trained_parameters().values()]


def test_gradients_of_eight_adapters_are_those_of_eight_solo_passes_bit_for_bit(bases, rows):
    model = load_model(bases["wide-llama"], dtype=torch.float32, device=torch.device("cpu")).requires_grad_(False)
    from lorainit.model.layout import choose_layout

    assert choose_layout(model).rows == "packed"
    samples = load(rows, make_tokenizer(), max_length=256).samples
    adapters = [adapter(model, seed, r=2 + seed % 3) for seed in range(8)]
    parts = [samples[i : i + 1 + i % 3] for i in range(8)]
    slots = group.AdapterSlots(model)
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + sum(len(s.ids) for s in part))
    slots.put(adapters, list(pairwise(ends)))
    counts = [sum(int(s.trained[1:].sum()) for s in part) for part in parts]
    found = sum_losses_by_adapter(model, pack([s for part in parts for s in part]), counts)
    torch.stack([part.loss for part in found]).sum().backward()
    shared = [gradients(layers) for layers in adapters]
    for layers, part, theirs, sums in zip(adapters, parts, shared, found, strict=True):
        for layer in layers.values():
            layer.zero_grad()
        batch = pack(part)
        slots.put([layers], [(0, batch.ids.numel())])
        solo = sum_losses(model, batch)
        solo.loss.backward()
        assert torch.equal(solo.loss, sums.loss)
        for one, two in zip(gradients(layers), theirs, strict=True):
            assert one.any()
            assert torch.equal(one, two)
    slots.clear()
