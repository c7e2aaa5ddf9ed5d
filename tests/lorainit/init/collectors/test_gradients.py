"""The mean full gradient: exact, one at a time, and without a trace."""

import gc

import pytest
import torch

from lorainit.config.errors import InitFailed, UnsupportedInit
from lorainit.config.events import Message, Tick
from lorainit.data.batches import Budget, collate, split_into_batches
from lorainit.data.dataset import Sample
from lorainit.data.reader import load
from lorainit.init.collectors import gradients
from lorainit.init.collectors.collect import collect
from lorainit.init.collectors.gradients import compute_mean_gradients
from lorainit.model.forward.loss import row_losses, sum_losses
from lorainit.model.load import load_model
from lorainit.model.targets.targets import find_targets
from tests.lorainit.conftest import make_tokenizer
from tests.lorainit.reference import CPU, context, eight_rows, tiny


@pytest.fixture(scope="module")
def samples(rows):
    return load(rows, make_tokenizer(), max_length=256).samples


def quiet(done, total):
    pass


def take(model, targets, samples, *, size=1):
    return compute_mean_gradients(model, targets, samples, pad=0, device=CPU, budget=Budget(size), on_tick=quiet)


def accumulated(model, targets, samples):
    """The same by plain accumulation in `.grad`: each row's mean loss over its own trained tokens."""
    weights = {name: module.weight.requires_grad_() for name, module in targets.items()}
    for piece in split_into_batches(samples, Budget(1)):
        part = sum_losses(model, collate(piece, pad=0))
        (part.loss / part.tokens).backward()
    found = {name: weight.grad / len(samples) for name, weight in weights.items()}
    for weight in weights.values():
        weight.grad = None
        weight.requires_grad_(requires_grad=False)
    return found


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_gradients_are_those_of_plain_accumulation_exactly(bases, samples, base):
    model = load_model(bases[base], dtype=torch.float32, device=CPU)
    targets = find_targets(model, "all-linear")
    wanted = accumulated(model, targets, samples)
    found = take(model, targets, samples)
    assert found.keys() == targets.keys()
    for name, G in found.items():
        assert torch.equal(G, wanted[name].T if base == "gpt2" else wanted[name])
        assert (G.dtype, G.device, G.is_contiguous()) == (torch.float32, CPU, True)


def test_conv1d_gradients_are_out_by_in(bases, samples):
    model = load_model(bases["gpt2"], dtype=torch.float32, device=CPU)
    found = take(model, find_targets(model, ["c_fc"]), samples[:2])
    assert {G.shape for G in found.values()} == {(128, 32)}


def test_neither_batching_nor_padding_changes_the_gradient(bases, samples):
    model = load_model(bases["llama"], dtype=torch.float32, device=CPU)
    targets = find_targets(model, "all-linear")
    one, many = take(model, targets, samples), take(model, targets, samples, size=5)
    for name, G in one.items():
        assert float((many[name] - G).norm() / G.norm()) < 1e-5


def test_gradients_are_taken_off_the_device_one_by_one(bases, samples):
    model = load_model(bases["llama"], dtype=torch.bfloat16, device=CPU)
    targets = find_targets(model, "all-linear")
    shapes = {module.weight.shape for module in targets.values()}
    left, before = [], {id(t) for t in gc.get_objects()}

    class Watching(dict):
        """Counts gradients in the base's dtype that are still there when the next one has been taken away."""

        def __setitem__(self, name, G):
            super().__setitem__(name, G)
            tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor and id(t) not in before]
            left.extend(t for t in tensors if t.dtype == torch.bfloat16 and t.shape in shapes)
            left.extend(p for p in model.parameters() if p.grad is not None)

    sums = Watching()
    with gradients._gradients_taken_away(model, targets, sums):
        row_losses(model, collate(samples[:2], pad=0)).sum().backward()
    assert sums.keys() == targets.keys()
    assert left == []


def test_an_input_that_the_model_overwrites_is_refused(bases, samples):
    model = load_model(bases["llama"], dtype=torch.float32, device=CPU)
    targets = find_targets(model, ["down_proj"])
    name, module = list(targets.items())[-1]
    seen = []
    module.register_forward_hook(lambda module, args, y: seen.append(args[0].detach()))

    def overwrite(module, args):
        seen[-1].mul_(2)

    model.get_submodule("model.norm").register_forward_pre_hook(overwrite)
    with pytest.raises(UnsupportedInit, match=f"{name}.*in place"):
        take(model, targets, samples[:1])


@pytest.mark.parametrize("fails", [False, True])
def test_model_comes_back_as_it_was(bases, samples, fails):
    model = load_model(bases["llama"], dtype=torch.float32, device=CPU)
    targets = find_targets(model, ["q_proj"])
    trained = model.get_parameter("model.norm.weight").requires_grad_()
    trained.grad = kept = torch.ones_like(trained)
    state = {name: p.clone() for name, p in model.named_parameters()}

    def stop(done, total):
        if fails:
            raise KeyboardInterrupt

    try:
        compute_mean_gradients(model, targets, samples[:2], pad=0, device=CPU, budget=Budget(1), on_tick=stop)
    except KeyboardInterrupt:
        assert fails
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["model.norm.weight"]
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["model.norm.weight"]
    assert trained.grad is kept
    assert torch.equal(kept, torch.ones_like(kept))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not model.training
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters())


def test_bf16_base_gives_float32_gradients(bases, samples):
    exact, rough = (
        take(model, find_targets(model, ["v_proj", "down_proj"]), samples[:2])
        for model in (load_model(bases["llama"], dtype=d, device=CPU) for d in (torch.float32, torch.bfloat16))
    )
    for name, G in exact.items():
        assert rough[name].dtype == torch.float32
        assert float((rough[name] - G).norm() / G.norm()) < 0.05


# --- as evidence -------------------------------------------------------------------------------

ONE = {"method": "lora_one", "samples": 4}


def test_only_the_first_rows_are_looked_at_with_a_tick_each():
    events = []
    found = context(tiny(), eight_rows(), ONE, on_event=events.append)
    evidence = collect(found.lora.method, found)
    assert {e.rows for e in evidence.values()} == {4}
    assert events == [Tick(done=i, total=4) for i in range(1, 5)]
    wanted = take(found.model, found.targets, eight_rows()[:4])
    assert all(torch.equal(evidence[name].gradient, G) for name, G in wanted.items())


def test_fewer_rows_than_asked_for_are_said_aloud_and_counted():
    events = []
    found = context(tiny(), eight_rows()[:3], ONE, on_event=events.append)
    assert {e.rows for e in collect(found.lora.method, found).values()} == {3}
    (said,) = [e for e in events if isinstance(e, Message)]
    assert (said.level, said.data["samples"], said.data["asked"]) == ("warn", 3, 4)


@pytest.mark.parametrize("samples", [[], [Sample(1, torch.arange(5), torch.zeros(5, dtype=torch.bool))]])
def test_no_usable_row_is_refused(samples):
    found = context(tiny(), samples, ONE)
    with pytest.raises(UnsupportedInit, match="no calibration row has a trained token"):
        collect(found.lora.method, found)


def test_modules_without_a_gradient_are_refused_by_name_and_cause():
    found = context(tiny(), eight_rows(), ONE)
    found.model.get_parameter("model.layers.1.self_attn.o_proj.weight").data.zero_()
    with pytest.raises(UnsupportedInit, match=r"zero in model\.layers\.1\.self_attn\.q_proj, .*v_proj.*trained") as e:
        collect(found.lora.method, found)
    assert "o_proj" not in e.value.message
    assert "layers.0" not in e.value.message


def test_gradients_that_are_not_finite_are_refused_by_name():
    found = context(tiny(), eight_rows(), ONE, wanted=["down_proj"])
    found.model.get_parameter("model.layers.1.mlp.up_proj.weight").data.fill_(float("inf"))
    with pytest.raises(InitFailed, match=r"not finite in model\.layers\.0\.mlp\.down_proj"):
        collect(found.lora.method, found)
