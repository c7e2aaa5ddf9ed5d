"""Curvature by differences of gradients, against the exact Hessian of the same tiny model."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from benchmarks import rate_first_update as first_update
from benchmarks.rate_curvature import extreme_eigenvalues, flatten
from benchmarks.rate_first_update import measure_first_update, surroundings
from lorainit.config.errors import InitFailed
from lorainit.config.spec import Hyperparameters, Lora
from lorainit.data.reader import load
from lorainit.init.initialize import initialize
from lorainit.model.layers.layer import attach, detach
from lorainit.model.load import load_model
from lorainit.model.targets.targets import find_targets
from tests.lorainit.conftest import bases, make_tokenizer, rows, tokenizer
from tests.lorainit.contexts import CPU, run_of

__all__ = ["bases", "rows", "tokenizer"]  # fixtures

TARGETS = {"llama": ["down_proj"], "gpt2": ["c_attn"]}


def start(base, bases, rows, init, **training):
    """A run on a tiny model after its initialization, and its first rows."""
    model = load_model(bases[base], dtype=torch.float32, device=CPU)
    found = run_of(
        model,
        find_targets(model, TARGETS[base]),
        load(rows, make_tokenizer(), max_length=256),
        Lora.model_validate({"init": init, "r": 2}).resolve()[0],
        training=Hyperparameters(n_epochs=1, batch_size=4, learning_rate=1e-3, **training),
        size=4,
    )
    found.base.dtype = torch.float32
    probe = found.base.make_batch(found.data.samples[:2])
    initialize(model, found.targets, found.lora, seed=0, probe=probe, on_event=lambda event: None)
    found.layers = detach(model)
    return found, found.data.samples[:2]


class Exact(nn.Module):
    """An adapted layer in float64 that can be differentiated twice: W·x + s·(B·A - B0·A0)·x."""

    def __init__(self, layer, place):
        super().__init__()
        self.layer, self.place, self.base = layer, place, layer.base
        self.offset = None if layer.A0 is None else (layer.B0 @ layer.A0).double()

    def forward(self, x):
        A, B = self.place
        change = B @ A if self.offset is None else B @ A - self.offset
        return self.base(x) + self.layer.scale * F.linear(x, change)


def exact_loss(found, rows):
    """The loss as a function of all parameters in one float64 vector."""
    model = found.model.double()
    model.set_attn_implementation("eager")
    places = {name: [None, None] for name in found.layers}
    for name, layer in found.layers.items():
        attach(model, name, Exact(layer, places[name]))
    batch = found.base.make_batch(rows)

    def loss(vector):
        at = 0
        for name, layer in found.layers.items():
            for i, factor in enumerate((layer.A, layer.B)):
                places[name][i] = vector[at : at + factor.numel()].view_as(factor)
                at += factor.numel()
        logits = model(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1)[batch.predicting], batch.targets)

    return loss


def exact_hessian(found, rows):
    """H at the run's start, float64. The model is in float64 afterwards."""
    return torch.autograd.functional.hessian(exact_loss(found, rows), flatten(found.parameters).double())


def settled(found):
    """Bits of the parameters, and whether they have gradients."""
    return [(p.detach().clone(), p.grad is None) for p in found.parameters]


@pytest.mark.parametrize(("base", "init"), [("llama", "kaiming"), ("llama", "pissa"), ("gpt2", "loram")])
def test_curvature_along_the_update_and_eigenvalues_are_those_of_the_exact_hessian(base, init, bases, rows):
    """`Linear` in plain and in difference form, and `Conv1D`."""
    found, some = start(base, bases, rows, init)
    with surroundings(found, some) as around:
        measured = measure_first_update(found, around)
        _, gradient = around.look()
        many = extreme_eigenvalues(around, gradient, products=16, seed=0)
    H, u = exact_hessian(found, some), measured.direction.double()
    values = torch.linalg.eigvalsh(H)
    assert measured.curvature == pytest.approx(float(u @ H @ u), rel=0.01)
    for of in (measured.eigenvalues, many):
        assert float((values - of.largest).abs().min()) <= (of.residual + 0.01) * abs(of.largest)
    assert many.largest == pytest.approx(float(values[-1]), rel=0.02)
    assert many.smallest == pytest.approx(float(values[0]), rel=0.02)


def test_a_product_is_that_of_the_exact_hessian(bases, rows):
    found, some = start("llama", bases, rows, "orthogonal")
    v = torch.randn(sum(p.numel() for p in found.parameters), generator=torch.Generator().manual_seed(1))
    with surroundings(found, some) as around:
        Hv = around.multiply(v, step=1e-2).double()
    exact = exact_hessian(found, some) @ v.double()
    assert float((Hv - exact).norm() / exact.norm()) < 2e-3


def test_the_size_is_the_relative_change_of_the_weights_per_rate(bases, rows):
    found, some = start("gpt2", bases, rows, "pissa")
    with surroundings(found, some) as around:
        measured = measure_first_update(found, around)
        parts = iter(around.split(measured.direction))
    sizes, changes, weights = dict[str, float](), [], []
    for name, layer in found.layers.items():
        u_A, u_B = next(parts), next(parts)
        changes.append(float((layer.scale * (u_B @ layer.A + layer.B @ u_A)).detach().norm()))
        weights.append(float(layer.base.weight.norm()))
        sizes[name] = changes[-1] / weights[-1]
    assert measured.sizes == pytest.approx(sizes, rel=1e-4)
    assert measured.size == pytest.approx(math.hypot(*changes) / math.hypot(*weights), rel=1e-4)


@pytest.mark.parametrize("optimizer", [{"name": "adamw"}, {"name": "adamw_lora_plus", "ratio": 16}])
def test_the_direction_is_the_first_update_of_the_runs_own_optimizer(optimizer, bases, rows):
    """B starts at zero with kaiming, so A has no gradient: it stays, and every entry of B moves by the rate."""
    found, some = start("llama", bases, rows, "kaiming", optimizer=optimizer)
    with surroundings(found, some) as around:
        u = around.split(measure_first_update(found, around).direction)
    ratio = optimizer.get("ratio", 1)
    assert not any(part.any() for part in u[::2])
    for part in u[1::2]:
        assert float(part.abs().median()) == pytest.approx(ratio, rel=1e-3)


def test_a_measurement_leaves_parameters_and_gradients_as_they_were(bases, rows):
    found, some = start("llama", bases, rows, "pissa")
    before = settled(found)
    with surroundings(found, some) as around:
        measure_first_update(found, around)
    for (value, bare), (now, still) in zip(before, settled(found), strict=True):
        assert torch.equal(value, now) and bare and still


def test_a_measurement_gives_the_same_numbers_again(bases, rows):
    found, some = start("llama", bases, rows, "loram")

    def once():
        with surroundings(found, some) as around:
            return measure_first_update(found, around)

    one, other = once(), once()
    assert torch.equal(one.direction, other.direction)
    assert replace(one, direction=None) == replace(other, direction=None)


def test_a_measurement_computes_as_many_gradients_as_it_says(bases, rows, monkeypatch):
    found, some = start("llama", bases, rows, "orthogonal")
    calls, compute = [], first_update.forward_backward
    monkeypatch.setattr(first_update, "forward_backward", lambda *given: calls.append(1) or compute(*given))
    with surroundings(found, some) as around:
        measured = measure_first_update(found, around)
    assert len(calls) == measured.gradients == 3 + 2 * (first_update.PRODUCTS + 1)


def test_a_start_without_a_gradient_cannot_be_measured(bases, rows):
    found, some = start("llama", bases, rows, "orthogonal")
    with torch.no_grad():
        for parameter in found.parameters:
            parameter.zero_()
    with surroundings(found, some) as around, pytest.raises(InitFailed, match="gradient"):
        measure_first_update(found, around)
