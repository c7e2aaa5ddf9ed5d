"""Where stock PEFT 0.21 computes other factors than the papers say, by how much, and ours beside them.

A failure of the first half of a test says that PEFT has changed, and that our reason is gone. The size of
LoRA-GA's factors is in `test_lora_ga.py` too, EVA's scale under rsLoRA in `test_eva.py`.
"""

import copy
from dataclasses import replace

import pytest
import torch
from peft import EvaConfig, LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora.eva import initialize_lora_eva_weights
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorainit.data.batches import collate
from lorainit.data.dataset import Sample
from lorainit.init.collectors.collect import collect
from lorainit.init.evidence import Evidence
from lorainit.init.methods import METHODS
from lorainit.model.layers.layer import LoRALinear, adapted_layers
from lorainit.model.layers.weight import weight_of
from lorainit.runtime.devices import make_generator
from tests.lorainit.reference import eight_rows, factors_of, tiny
from tests.lorainit.stock_peft import ALPHA, INITS, Q_PROJ, TARGETS, R, S, asked, ours, pefts, pefts_factors

# Stock PEFT's own warnings are not under test.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _own_random_state():
    """PEFT draws from the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


# --- OLoRA -------------------------------------------------------------------------------------


def test_olora_of_peft_at_scale_2_reflects_the_base_and_ours_takes_the_leading_part_once():
    W = weight_of(tiny().get_submodule(Q_PROJ))
    Q, T = torch.linalg.qr(W)
    leading = Q[:, :R] @ T[:R]
    left = pefts("olora").get_submodule(f"base_model.model.{Q_PROJ}").base_layer.weight
    assert torch.allclose(left, W - S * leading, atol=1e-5)
    assert float(left.norm()) == pytest.approx(float(W.norm()), rel=1e-4)  # nothing was taken away
    layer = adapted_layers(ours("olora"))[Q_PROJ]
    assert torch.allclose(S * layer.B0 @ layer.A0, leading, atol=1e-5)
    assert float((W - leading).norm()) < 0.9 * float(W.norm())


def test_pissa_of_peft_is_right_at_scale_2_as_ours_is():
    """The control: what is not broken."""
    W = weight_of(tiny().get_submodule(Q_PROJ))
    U, spectrum, Vh = torch.linalg.svd(W, full_matrices=False)
    best = U[:, :R] @ torch.diag(spectrum[:R]) @ Vh[:R]
    left = pefts("pissa").get_submodule(f"base_model.model.{Q_PROJ}").base_layer.weight
    assert torch.allclose(left, W - best, atol=1e-5)
    layer = adapted_layers(ours("pissa"))[Q_PROJ]
    assert torch.allclose(S * layer.B0 @ layer.A0, best, atol=1e-5)


def test_olora_of_peft_breaks_on_conv1d_and_ours_does_not():
    torch.manual_seed(0)
    base, x = Conv1D(36, 12).requires_grad_(requires_grad=False), torch.randn(3, 12)
    config = LoraConfig(r=4, target_modules=["x"], init_lora_weights="olora", fan_in_fan_out=True)
    model = get_peft_model(nn.ModuleDict({"x": copy.deepcopy(base)}), config)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        model.base_model.model["x"](x)
    factors = METHODS["olora"](
        weight_of(base), Evidence(), rank=4, scale=S, config=asked("olora").lora.method, generator=torch.Generator()
    )
    layer = LoRALinear(base, factors, scale=S, subtract=True)
    assert torch.allclose(layer(x), base(x), atol=1e-6)


# --- LoRA-GA -----------------------------------------------------------------------------------


def our_gradients(factor=1.0):
    found = asked(INITS["lora_ga"])
    evidence = collect(found.lora.method, found)
    return found, {name: replace(e, gradient=factor * e.gradient) for name, e in evidence.items()}


def test_lora_ga_of_peft_shrinks_with_the_loss_and_ours_has_the_papers_size():
    """‖s·B·A‖ = s·sqrt(m·r)/gamma = 2.83 here, whatever the loss is multiplied by."""
    products, sizes = [], []
    for factor in (1.0, 0.01):
        A, B = pefts_factors(pefts("lora_ga", factor=factor))
        products.append(float((S * B @ A).norm()))
        factors = factors_of(*our_gradients(factor))[Q_PROJ]
        sizes.append(float((S * factors.B @ factors.A).norm()))
    assert products[0] < 0.1
    assert products[1] == pytest.approx(0.01 * products[0], rel=1e-2)
    assert sizes == pytest.approx([S * (64 * R) ** 0.5 / 16] * 2, rel=1e-3)


def on_a_layer(base, gradient, *, direction="ArB2r"):
    """(A, B) of stock PEFT and of ours for one layer, r = 4, and the gradient's singular vectors."""
    base._peft_loraga_grad = gradient if isinstance(base, nn.Linear) else gradient.T.contiguous()
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["x"], init_lora_weights="lora_ga", fan_in_fan_out=isinstance(base, Conv1D),
        lora_ga_config=LoraGAConfig(direction=direction),
    )  # fmt: skip
    W = weight_of(base).detach().clone()
    layer = get_peft_model(nn.ModuleDict({"x": base}), config).base_model.model["x"]
    method = asked({"method": "lora_ga", "direction": direction}).lora.method
    factors = METHODS["lora_ga"](
        W, Evidence(gradient=gradient), rank=4, scale=S, config=method, generator=make_generator(0, "x")
    )
    U, singular, Vh = torch.linalg.svd(gradient, full_matrices=False)
    theirs = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    return theirs, (factors.A, factors.B), (U, singular, Vh)


def steep(m, n):
    """A gradient with well separated singular values."""
    generator = torch.Generator().manual_seed(3)
    U, V = (torch.linalg.qr(torch.randn(side, 16, generator=generator)).Q for side in (m, n))
    return U @ torch.diag(0.7 ** torch.arange(16.0)) @ V.T


def test_lora_ga_of_peft_takes_the_inputs_of_conv1d_for_its_outputs():
    torch.manual_seed(0)
    (_, B), (mine_A, mine_B), (_, singular, _) = on_a_layer(Conv1D(144, 48), steep(144, 48))
    assert torch.allclose(B.norm(dim=0) / singular[4:8], torch.full((4,), 48**0.25 / 4), rtol=1e-3)
    for norms in (mine_A.norm(dim=1), mine_B.norm(dim=0)):
        assert torch.allclose(norms, torch.full((4,), 144**0.25 / 4), rtol=1e-3)


def test_random_directions_of_peft_are_the_same_for_both_factors_and_ours_are_disjoint():
    torch.manual_seed(0)
    theirs, mine, (U, _, Vh) = on_a_layer(nn.Linear(48, 64), steep(64, 48), direction="random")

    def chosen(A, B):
        return set((A @ Vh.T).abs().argmax(1).tolist()), set((U.T @ B).abs().argmax(0).tolist())

    a, b = chosen(*theirs)
    assert a == b
    a, b = chosen(*mine)
    assert len(a) == len(b) == 4
    assert not a & b


# --- CorDA and EVA -----------------------------------------------------------------------------


def test_corda_of_peft_counts_padding_and_takes_one_row_at_a_time():
    A, B = pefts_factors(pefts("corda"))
    padded_A, padded_B = pefts_factors(pefts("corda", padding=32))
    assert float((padded_B @ padded_A - B @ A).norm()) > 0.2 * float((B @ A).norm())
    with pytest.raises(RuntimeError, match="2 dimensions"):
        pefts("corda", size=2)


def test_corda_with_the_authors_balance_has_pefts_factors_and_ours_their_product_with_equal_norms():
    A, B = pefts_factors(pefts("corda"))
    theirs, ours = (corda_factors(balance) for balance in ("authors", "equal"))
    assert torch.allclose(theirs.A.abs(), A.abs(), rtol=1e-3, atol=1e-4)
    assert torch.allclose(theirs.B.abs(), B.abs(), rtol=1e-3, atol=1e-4)
    assert torch.allclose(theirs.B @ theirs.A, B @ A, atol=1e-4)
    assert float(A.norm()) != pytest.approx(float(B.norm()), rel=0.1)
    assert float(ours.A.norm()) == pytest.approx(float(ours.B.norm()), rel=1e-5)


def corda_factors(balance):
    found = asked({**INITS["corda"], "balance": balance})
    return factors_of(found, collect(found.lora.method, found))[Q_PROJ]


def test_our_corda_sees_the_same_in_padded_batches():
    rows = [Sample(row.line, row.ids[: 18 + 2 * i], row.trained[: 18 + 2 * i]) for i, row in enumerate(eight_rows())]
    products = []
    for size in (1, 8):
        found = asked(INITS["corda"], rows, size)
        factors = factors_of(found, collect(found.lora.method, found))[Q_PROJ]
        products.append(factors.B @ factors.A)
    assert float((products[0] - products[1]).norm()) < 1e-3 * float(products[0].norm())


class Exhausted(Exception):
    pass


def test_eva_of_peft_goes_round_for_ever_on_short_batches_and_ours_adds_them_up(capsys):
    """Batches of 12 tokens for rho·r = 16 directions: PEFT prints, skips them and starts again."""
    config = LoraConfig(
        r=R, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    rows = [Sample(row.line, row.ids[:12], row.trained[:12]) for row in eight_rows()]

    feed = [{"input_ids": b.ids, "attention_mask": b.attention} for b in (collate([row], pad=0) for row in rows)]
    passes = 0

    def forward(model, inputs):
        nonlocal passes
        passes += 1
        if passes > 10 * len(rows):
            raise Exhausted
        model(**inputs)

    with pytest.raises(Exhausted):
        initialize_lora_eva_weights(get_peft_model(tiny(), config), feed, forward_fn=forward, show_progress_bar=False)
    assert "skipping SVD" in capsys.readouterr().out
    found = asked({"method": "eva", "samples": 8, "tau": 0.9}, rows)
    evidence = collect(found.lora.method, found)
    for one in evidence.values():
        assert torch.allclose(one.directions @ one.directions.T, torch.eye(len(one.directions)), atol=1e-5)
    assert sum(one.rank for one in evidence.values()) == R * len(evidence)
