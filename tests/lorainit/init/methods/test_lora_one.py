"""LoRA-One's factors, its known numbers on a tiny model, and our line search."""

import math

import pytest
import torch
from pydantic import ValidationError

from lorainit.config.errors import InitFailed
from lorainit.config.events import Message, Tick
from lorainit.config.inits.data import LoRAOne
from lorainit.config.rates import SIZES
from lorainit.config.resolve import base_learning_rate
from lorainit.config.spec import BaseModelRef, Lora
from lorainit.init.collectors import line_search
from lorainit.init.collectors.collect import collect
from lorainit.init.evidence import Evidence
from lorainit.init.methods.lora_one import lora_one
from lorainit.model.layers.factors import Factors
from lorainit.run import run
from tests.lorainit.reference import context, eight_rows, factors_of, loss_of, loss_with, tiny

S0 = 16 / math.sqrt(8)
ONE = {"method": "lora_one"}


def matrix(m=48, n=64, power=1.0, seed=0):
    """Singular values i^-power."""
    g = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(d, min(m, n), generator=g)).Q for d in (m, n))
    return U @ torch.diag(torch.arange(1.0, min(m, n) + 1) ** -power) @ V.T


def start(G, *, rank=8, seed=0, **config):
    made = LoRAOne.model_validate({"method": "lora_one", **config})
    generator = torch.Generator().manual_seed(seed)
    W = torch.zeros_like(G)
    return lora_one(W, Evidence(gradient=G), rank=rank, scale=S0, config=made, generator=generator)


def best(G, r):
    U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    return (U[:, :r] * S[:r]) @ Vh[:r], S


def apart(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


# --- v3 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (200, 150)])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_product_is_one_gradient_step_of_rank_r(shape, power):
    G = matrix(*shape, power=power)
    P, S = best(G, 8)
    found = start(G, gamma=128.0)
    product = S0 * (found.B @ found.A)
    assert apart(product, -S0 / (128 * S[0]) * P) < 1e-4
    assert float(torch.linalg.matrix_norm(product, 2)) == pytest.approx(S0 / 128, rel=1e-4)
    balance = torch.diag(S[:8] / S[0]).float() / 128
    assert torch.allclose(found.A @ found.A.T, balance, atol=1e-6)
    assert torch.allclose(found.B.T @ found.B, balance, atol=1e-6)


def test_product_with_the_full_svd_is_exact_to_five_digits():
    G = matrix(200, 150, power=0.5)
    P, S = best(G, 8)
    found = start(G, niter=None)
    assert apart(S0 * (found.B @ found.A), -S0 / (128 * S[0]) * P) < 1e-5
    assert torch.equal(found.A, start(G, niter=None, seed=1).A)


def test_analytic_case():
    found = start(torch.diag(torch.tensor([4.0, 1.0])), rank=2, gamma=128.0)
    wanted = -torch.diag(torch.tensor([0.0078125, 0.001953125]))
    assert torch.allclose(found.B @ found.A, wanted, atol=1e-7)


@pytest.mark.parametrize("config", [{}, {"version": "v1"}])
def test_size_of_the_loss_does_not_matter(config):
    G = matrix()
    one, two = start(G, **config), start(0.01 * G, **config)
    assert apart(two.A, one.A.double()) < 1e-4
    assert apart(two.B, one.B.double()) < 1e-4


@pytest.mark.parametrize("gamma", [None, 128.0])
def test_published_gamma_is_128(gamma):
    found = start(matrix(), gamma=gamma)
    assert float(torch.linalg.matrix_norm(found.B @ found.A, 2)) == pytest.approx(1 / 128, rel=1e-4)


# --- v1 ----------------------------------------------------------------------------------------


def test_v1_has_orthonormal_directions_of_one_size_and_is_subtracted():
    G = matrix(48, 64)
    found = start(G, version="v1")
    size = math.sqrt(48) / 64  # m = out, gamma = 64
    assert torch.linalg.svdvals(found.B @ found.A)[:8].tolist() == pytest.approx([size] * 8, rel=1e-5)
    assert torch.allclose(found.A @ found.A.T, size * torch.eye(8), atol=1e-6)
    U = torch.linalg.svd(G).U[:, :8]
    assert torch.allclose(found.B @ found.B.T / size, U @ U.T, atol=1e-4)
    config = LoRAOne(method="lora_one", version="v1")
    assert (config.offset, config.function_preserving) == ("subtract", True)
    assert LoRAOne(method="lora_one").offset == "none"


def test_sign_of_the_gradient_flips_one_factor_of_v1():
    G = matrix()
    one, two = start(G, version="v1"), start(-G, version="v1")
    assert torch.allclose(one.B @ one.A, -two.B @ two.A, atol=1e-6)


@pytest.mark.parametrize("version", ["v3", "v1"])
def test_rank_above_the_gradients_is_a_fact(version):
    poor = best(matrix(), 5)[0].float()
    assert start(poor, version=version).facts == {"gradient_rank": 5}
    assert start(matrix(), version=version).facts == {}


# --- a tiny model with known numbers ------------------------------------------------------------

# gamma: loss after the start, first-order prediction of the change, loss with the wrong sign
TABLE = {
    1024.0: (4.6128, -0.0312, 4.6749),
    128.0: (4.4357, -0.2494, 4.8521),
    64.0: (4.3443, -0.4987, 4.9513),
    16.0: (4.3030, -1.9948, 4.9990),
}


@pytest.fixture(scope="module")
def collected():
    """The tiny model's context and gradients; the model is left as it is by every test."""
    found = context(tiny(), eight_rows(), ONE)
    return found, collect(found.lora.method, found)


def at(found, gamma):
    return context(found.model, found.samples, ONE | {"gamma": gamma})


def predicted(found, evidence, factors):
    return found.lora.scaling * sum(float((evidence[name].gradient * (f.B @ f.A)).sum()) for name, f in factors.items())


@pytest.mark.parametrize("gamma", TABLE)
def test_losses_are_the_known_ones_and_the_wrong_sign_hurts(collected, gamma):
    found, evidence = at(collected[0], gamma), collected[1]
    loss, first_order, wrong = TABLE[gamma]
    factors = factors_of(found, evidence)
    assert loss_of(found) == pytest.approx(4.6439, abs=1e-4)
    assert loss_with(found, factors) == pytest.approx(loss, abs=2e-4)
    assert loss_with(found, factors, sign=-1) == pytest.approx(wrong, abs=2e-4)
    assert predicted(found, evidence, factors) == pytest.approx(first_order, rel=2e-3)


@pytest.mark.parametrize(("gamma", "off"), [(1024.0, 0.03), (128.0, 0.25)])
def test_small_steps_change_the_loss_as_predicted(collected, gamma, off):
    found, evidence = at(collected[0], gamma), collected[1]
    factors = factors_of(found, evidence)
    change = loss_with(found, factors) - loss_of(found)
    assert change == pytest.approx(predicted(found, evidence, factors), rel=off)


def test_every_layer_steps_down_its_gradient_by_one_operator_norm(collected):
    found, evidence = at(collected[0], 128.0), collected[1]
    for name, f in factors_of(found, evidence).items():
        G, product = evidence[name].gradient, found.lora.scaling * (f.B @ f.A)
        assert float(torch.linalg.matrix_norm(product, 2)) == pytest.approx(0.044194, rel=1e-4)
        assert 0.76 < float(-(G * product).sum() / (G.norm() * product.norm())) < 0.98


# --- the line search ----------------------------------------------------------------------------


def searched(on_event=lambda event: None, samples=None, size=8):
    found = context(tiny(), samples or eight_rows(), ONE | {"gamma": "auto"}, on_event=on_event, size=size)
    return found, collect(found.lora.method, found)


def test_search_takes_the_best_step_it_tried_and_tells():
    events = []
    found, evidence = searched(events.append)
    (step,) = {e.step for e in evidence.values()}
    losses = dict(step.tried)
    assert len(losses) == 9
    assert not step.held_out  # eight rows, and the gradient took them all
    assert losses[step.gamma] == min(losses.values()) < step.base_loss
    for gamma in (1024.0, 64.0, 16.0):
        assert losses[gamma] == pytest.approx(TABLE[gamma][0], abs=2e-4)
    assert step.gamma == 32.0
    assert loss_with(found, factors_of(found, evidence)) == pytest.approx(losses[32.0], abs=1e-5)
    said = next(e for e in events if isinstance(e, Message))
    assert said.data["gamma"] == 32.0
    assert len(said.data["tried"]) == 9
    ticks = [e for e in events if isinstance(e, Tick)][1:]
    assert [(t.done, t.total) for t in ticks] == [(i, 9) for i in range(1, 10)]


def test_search_judges_the_step_on_rows_that_the_gradient_has_not_seen():
    rows = eight_rows()
    found = context(tiny(), rows, ONE | {"gamma": "auto", "samples": 5})
    step = collect(found.lora.method, found)["model.layers.0.mlp.up_proj"].step
    unseen = context(tiny(), rows[5:], ONE)
    assert step.held_out
    assert step.base_loss == pytest.approx(loss_of(unseen), abs=1e-5)


def test_search_leaves_the_model_as_it_was():
    found, _ = searched()
    for name, module in found.targets.items():
        assert found.model.get_submodule(name) is module
    assert loss_of(found) == pytest.approx(4.6439, abs=1e-4)


def test_search_fails_with_advice_if_no_step_helps(monkeypatch):
    def uphill(*args, **kwargs):
        factors = lora_one(*args, **kwargs)
        return Factors(A=factors.A, B=-factors.B)

    monkeypatch.setattr(line_search, "lora_one", uphill)
    with pytest.raises(InitFailed, match=r"no step along the gradient lowers .* More calibration rows") as caught:
        searched()
    assert caught.value.param == "lora.init.gamma"


def test_search_belongs_to_v3():
    with pytest.raises(ValidationError, match="v1, which takes no step"):
        LoRAOne(method="lora_one", version="v1", gamma="auto")


def test_run_with_a_searched_step_starts_below_the_base_and_exports(spec, tmp_path):
    events = []
    init = {"method": "lora_one", "gamma": "auto"}
    done = run(spec(lora={"init": init}, training={"max_steps": 1}), tmp_path, events.append)
    report = next(e.report for e in events if e.kind == "init_report")
    assert report["initial_loss"] < report["base_loss"]
    said = next(e.data for e in events if isinstance(e, Message) and "tried" in e.data)
    assert report["line_search"] == {key: said[key] for key in ("base_loss", "held_out", "tried")}
    assert {"gamma": report["gamma"], "loss": min(t["loss"] for t in said["tried"])} in said["tried"]
    assert done.export_check["passed"]


# --- what is recommended -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("init", "alpha", "rslora"), [("lora_one", 16.0, True), ("lora_ga", 16.0, True), ("pissa", 4.0, False)]
)
def test_auto_takes_the_methods_own_scale(init, alpha, rslora):
    lora, choices = Lora.model_validate({"init": init, "r": 4}).resolve()
    assert (lora.alpha, lora.use_rslora) == (alpha, rslora)
    assert [c.value for c in choices] == [alpha, rslora]
    kept = Lora.model_validate({"init": init, "r": 4, "alpha": 7.0, "use_rslora": not rslora})
    assert kept.resolve() == (kept, [])


def test_subtracted_starts_train_at_a_tenth_of_the_rate():
    model = BaseModelRef(id="x", source="x", root="local:x", weights=int(SIZES["7B"]))
    rates = {v: base_learning_rate(model, LoRAOne(method="lora_one", version=v)) for v in ("v3", "v1")}
    assert rates == pytest.approx({"v3": 2e-4, "v1": 2e-5})
