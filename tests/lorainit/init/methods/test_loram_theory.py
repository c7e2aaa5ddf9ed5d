"""LoRAM's propositions on how a start grows, each with its negative control."""

import pytest
import torch

from lorainit.config.inits import INITS
from lorainit.init.evidence import Evidence
from lorainit.init.methods import METHODS
from tests.lorainit.init.methods.test_loram import factors, weight

F64 = torch.float64


def _path(s, A, B, rates, *, optimizer, eps=(1e-8, 1e-8), steps=50):
    """Weight path of s·B·A under a quadratic loss; returns s·B·A after training."""
    A, B = A.clone().requires_grad_(), B.clone().requires_grad_()
    generator = torch.Generator().manual_seed(5)
    X = torch.randn(20, A.shape[1], generator=generator, dtype=F64)
    Y = torch.randn(20, B.shape[0], generator=generator, dtype=F64)
    groups = [{"params": [p], "lr": rate} for p, rate in zip((A, B), rates, strict=True)]
    if optimizer is torch.optim.Adam:
        for group, e in zip(groups, eps, strict=True):
            group["eps"] = e
    stepper = optimizer(groups)
    for _ in range(steps):
        stepper.zero_grad()
        ((X @ (s * B @ A).T - Y) ** 2).mean().backward()
        stepper.step()
    return (s * B @ A).detach()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_scale_and_size_of_the_factors_are_one_parameter(optimizer):
    """Proposition 1: (s, A, B, rates) and (s', a_A·A, a_B·B, scaled rates) walk the same path."""
    A, B, a_A, a_B, rate, power = *_start(), 2.0, 1.5, *((0.2, 2) if optimizer is torch.optim.SGD else (0.05, 1))
    one = _path(a_A * a_B, A, B, (rate, rate), optimizer=optimizer)
    scaled = (rate * a_A**power, rate * a_B**power)
    two = _path(1.0, a_A * A, a_B * B, scaled, optimizer=optimizer, eps=(1e-8 / a_A, 1e-8 / a_B))
    assert _moved(one, two, A, B, a_A * a_B) <= 1e-12


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_unchanged_rates_walk_another_path(optimizer):
    """The negative control of Proposition 1."""
    A, B, a_A, a_B, rate = *_start(), 2.0, 1.5, 0.2 if optimizer is torch.optim.SGD else 0.05
    one = _path(a_A * a_B, A, B, (rate, rate), optimizer=optimizer)
    control = _path(1.0, a_A * A, a_B * B, (rate, rate), optimizer=optimizer)
    assert _moved(one, control, A, B, a_A * a_B) > 0.3


def _start():
    found = factors(weight(12, 15), rank=4)
    return found.A.double(), found.B.double()


def _moved(one, two, A, B, s):
    """How far apart two ends are, relative to the way the first one went."""
    return float(torch.linalg.norm(one - two) / torch.linalg.norm(one - s * B @ A))


def _growth(found, eta, *, steps=200, correlated=False):
    """Mean square of the update after SGD with random gradients over Proposition 2's k1·eta²·t (s = 1)."""
    A, B = found.A.double(), found.B.double()
    (r, n), m = A.shape, B.shape[0]
    start, k1 = B @ A, r * (n * A.square().mean() ** 2 + m * B.square().mean() ** 2)
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(m, n, generator=generator, dtype=F64)
    for _ in range(steps):
        if not correlated:
            G = torch.randn(m, n, generator=generator, dtype=F64)
        A, B = A - eta * B.T @ G, B - eta * G @ A.T
    return float((B @ A - start).square().mean() / (k1 * eta**2 * steps))


@pytest.mark.parametrize("eta", [1e-3, 3e-4, 1e-4])
@pytest.mark.parametrize("method", ["loram", "pissa", "gaussian", "kaiming"])
def test_growth_of_the_update_is_the_papers(method, eta):
    """Proposition 2: with i.i.d. gradients the mean square of the update grows as k1·eta²·t."""
    W = torch.randn(300, 200, generator=torch.Generator().manual_seed(1)) * 0.05
    generator = torch.Generator().manual_seed(0)
    found = METHODS[method](
        W, Evidence(), rank=8, scale=1.0, config=INITS[method].model_validate({"method": method}), generator=generator
    )
    assert 0.8 < _growth(found, eta) < 1.25


def test_growth_of_the_update_needs_independent_gradients():
    """The negative control of Proposition 2: along one gradient it grows as t², beyond all bounds of the law."""
    W = torch.randn(300, 200, generator=torch.Generator().manual_seed(1)) * 0.05
    assert _growth(factors(W), 1e-4, correlated=True) > 50
