"""The adapted layer in bf16: an update that is small beside W·x must not be rounded away."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lorainit.model.layers.factors import Factors
from lorainit.model.layers.layer import LoRALinear
from lorainit.model.layers.low_rank import Slot, apply_low_rank

IN, OUT, R, ROWS = 96, 128, 4, 512
BF16 = torch.bfloat16


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def base():
    module = nn.Linear(IN, OUT, bias=False).to(BF16)
    with torch.no_grad():
        module.weight.copy_(normal(OUT, IN, seed=0) / IN**0.5)
    return module.requires_grad_(False)


def young(base, *, subtract):
    """An adapter after its first steps: its update moves W·x, of size 1, by about 0.0005."""
    A, B = normal(R, IN, seed=1) / IN**0.5, (normal(OUT, R, seed=2) if subtract else torch.zeros(OUT, R))
    layer = LoRALinear(base, Factors(A=A, B=B), scale=1.0, subtract=subtract)
    with torch.no_grad():
        layer.B += 5e-4 / R**0.5 * normal(OUT, R, seed=3)
    return layer


def share_kept(layer, forward):
    """Slope of the change that bf16 shows over the true change: 1 where nothing is lost on the average."""
    x = normal(ROWS, IN, seed=4).to(BF16)
    A, B = layer.A.double(), layer.B.double()
    change = B @ A if layer.A0 is None else B @ A - layer.B0.double() @ layer.A0.double()
    true = x.double() @ change.T
    shown = forward(layer, x).double() - x.double() @ layer.base.weight.double().T
    return float(((shown * true).sum() / (true * true).sum()).detach())


def naive(layer, x):
    """What PEFT does: W·x rounded to bf16, the branch in float32 beside it, their sum rounded again."""
    h = F.linear(x.float(), layer.A)
    branch = F.linear(h, layer.B)
    if layer.A0 is not None:
        branch = branch - F.linear(F.linear(x.float(), layer.A0), layer.B0)
    return layer.base(x) + branch.to(BF16)


def naive_in_bf16(layer, x):
    """One product of rank 2r with all factors rounded to bf16."""
    A, B = torch.cat([layer.A, layer.A0]).to(BF16), torch.cat([layer.B, -layer.B0], dim=1).to(BF16)
    return F.linear(torch.cat([x, F.linear(x, A)], 1), torch.cat([layer.base.weight, B], 1))


@pytest.mark.parametrize("subtract", [False, True])
def test_a_young_adapter_shows_all_of_its_update(base, subtract):
    assert share_kept(young(base, subtract=subtract), lambda layer, x: layer(x)) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("subtract", [False, True])
def test_the_naive_layer_loses_most_of_it(base, subtract):
    assert share_kept(young(base, subtract=subtract), naive) < 0.5


def test_rounded_factors_of_a_subtracted_start_do_not_cancel(base):
    """Why the difference is taken factor by factor, in float32."""
    layer = young(base, subtract=True)
    assert share_kept(layer, naive_in_bf16) < 0.85


def test_a_subtracted_start_begins_as_the_base_bit_for_bit(base):
    layer = LoRALinear(base, Factors(normal(R, IN, seed=1), normal(OUT, R, seed=2)), scale=3.0, subtract=True)
    x = normal(ROWS, IN, seed=4)
    wide = nn.Linear(IN, OUT, bias=False).requires_grad_(False)
    same = LoRALinear(wide, Factors(normal(R, IN, seed=1), normal(OUT, R, seed=2)), scale=3.0, subtract=True)
    assert torch.equal(same(x), wide(x))
    assert torch.allclose(layer(x.to(BF16)), base(x.to(BF16)), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("subtract", [False, True])
def test_gradients_are_those_of_the_formula(subtract):
    """float64, against autograd on W·x + s·(B·A - B0·A0)·(x ⊙ mask)."""
    F64 = torch.float64
    wide = nn.Linear(IN, OUT).to(F64).requires_grad_(False)
    A, B = (t.to(F64).requires_grad_() for t in (normal(R, IN, seed=1), normal(OUT, R, seed=2)))
    A0, B0 = (normal(R, IN, seed=5).to(F64), normal(OUT, R, seed=6).to(F64)) if subtract else (None, None)
    mask = None if subtract else (normal(7, IN, seed=8) > 0).to(F64) * 2
    x = normal(9, IN, seed=7).to(F64).requires_grad_()
    upper = normal(9, OUT, seed=9).to(F64)
    found = apply_low_rank(x, wide, [Slot(1, 8, A, B, A0, B0, 1.5, mask)])
    inner = x[1:8] if mask is None else x[1:8] * mask
    change = B @ A - (B0 @ A0 if subtract else 0)
    expected = wide(x) + F.pad(1.5 * inner @ change.T, (0, 0, 1, 1))
    ours, theirs = (torch.autograd.grad((y * upper).sum(), [x, A, B]) for y in (found, expected))
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    for one, two in zip(ours, theirs, strict=True):
        assert torch.allclose(one, two, rtol=1e-10, atol=1e-10)


def test_dropout_is_a_function_of_its_key():
    layer = LoRALinear(nn.Linear(IN, OUT), Factors(normal(R, IN, seed=1), normal(OUT, R, seed=2)), scale=1.0,
                       subtract=False, dropout=0.25)  # fmt: skip
    x = torch.ones(400, IN)
    assert layer.dropout.make_mask(x.shape, like=x) is None
    layer.dropout.key = "seed 0, step 1"
    one, again = (layer.dropout.make_mask(x.shape, like=x) for _ in range(2))
    assert torch.equal(one, again)
    assert one.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert float((one == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    layer.dropout.key = "seed 0, step 2"
    assert not torch.equal(one, layer.dropout.make_mask(x.shape, like=x))


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_a_model_may_add_to_the_output_in_place(base, dtype):
    """Falcon and Gemma 3n do, before anybody else has seen it."""
    layer = young(base.to(dtype), subtract=False)
    x = normal(1, 8, IN, seed=5).to(dtype)
    layer(x).add(1).square().sum().backward()
    expected = layer.B.grad.clone()
    layer.zero_grad()
    y = layer(x)
    y += 1
    y.square().sum().backward()
    assert torch.equal(layer.B.grad, expected)
