"""LoRA-GA with the authors' scaling: its identities, and what it does where LoRA-One and PEFT differ."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, LoraGAConfig, PeftModel, get_peft_model
from peft.tuners.lora.loraga import preprocess_loraga

from lorainit.config.errors import UnsupportedInit
from lorainit.config.inits.data import LoRAGA
from lorainit.data.batches import collate
from lorainit.export.peft_adapter import export
from lorainit.init.collectors.collect import collect
from lorainit.init.evidence import Evidence
from lorainit.init.initialize import initialize
from lorainit.init.methods.lora_ga import _largest_entry, lora_ga
from lorainit.model.forward.loss import logits_of, sum_losses
from lorainit.model.layers.layer import adapted_layers
from lorainit.model.layers.weight import weight_of
from tests.lorainit.reference import context, eight_rows, factors_of, loss_of, loss_with, tiny

S0 = 2.0


def gradient(m=48, n=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(d, min(m, n), generator=g)).Q for d in (m, n))
    return U @ torch.diag(1 / torch.arange(1.0, min(m, n) + 1)) @ V.T


def start(G, *, rank=8, W=None, seed=0, **config):
    made = LoRAGA.model_validate({"method": "lora_ga", **config})
    W = torch.zeros_like(G) if W is None else W
    generator = torch.Generator().manual_seed(seed)
    return lora_ga(W, Evidence(gradient=G), rank=rank, scale=S0, config=made, generator=generator)


def indices(found, G):
    """Which singular directions of G the rows of A and the columns of B are, from 0; None if none."""
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    A = (Vh @ found.A.T / found.A.norm(dim=1)).abs()
    B = (U.T @ found.B / found.B.norm(dim=0)).abs()
    assert A.max(0).values.min() > 1 - 1e-4
    assert B.max(0).values.min() > 1 - 1e-4
    return A.argmax(0).tolist(), B.argmax(0).tolist()


@pytest.mark.parametrize(
    ("direction", "A", "B"),
    [
        ("ArB2r", [0, 1, 2, 3], [4, 5, 6, 7]),
        ("A2rBr", [4, 5, 6, 7], [0, 1, 2, 3]),
        ("ArBr", [1, 3, 5, 7], [0, 2, 4, 6]),
    ],
)
def test_directions(direction, A, B):
    G = gradient()
    assert indices(start(G, rank=4, direction=direction), G) == (A, B)


def test_random_directions_are_disjoint_and_follow_the_seed():
    G = gradient()
    A, B = indices(start(G, rank=4, direction="random"), G)
    assert sorted(A + B) == list(range(8))
    assert indices(start(G, rank=4, direction="random"), G) == (A, B)
    assert len({str(indices(start(G, rank=4, direction="random", seed=s), G)) for s in range(5)}) > 1


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
def test_stable_factors_have_the_papers_size_and_no_part_in_the_gradient(direction, shape):
    G = gradient(*shape)
    found = start(G, direction=direction)
    size = math.sqrt(shape[0]) / 16 * torch.eye(8)  # out features, gamma 16
    assert torch.allclose(found.A @ found.A.T, size, atol=1e-5)
    assert torch.allclose(found.B.T @ found.B, size, atol=1e-5)
    assert abs(float((G * (found.B @ found.A)).sum())) < 1e-6


@pytest.mark.parametrize(("scale", "size"), [("unit", 1.0), ("gd", 1 / S0)])
def test_unit_and_gd_scales(scale, size):
    found = start(gradient(), scale=scale)
    assert found.A.norm(dim=1).tolist() == pytest.approx([size] * 8, rel=1e-5)
    assert found.B.norm(dim=0).tolist() == pytest.approx([size] * 8, rel=1e-5)


def test_weight_scale_is_the_mean_root_of_the_weights_top_singular_values():
    W = gradient(seed=5)
    found = start(gradient(), W=W, scale="weight_svd")
    size = float((torch.linalg.svdvals(W)[:8] / S0).sqrt().mean())
    assert found.A.norm(dim=1).tolist() == pytest.approx([size] * 8, rel=1e-4)


def test_first_step_with_unit_factors_is_the_best_step_of_rank_2r():
    G = gradient().double()
    found = start(gradient(), rank=4, scale="unit")
    A, B = found.A.double(), found.B.double()
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    best = (U[:, :8] * S[:8]) @ Vh[:8]
    rate = 1e-6
    new = (B - rate * S0 * G @ A.T) @ (A - rate * S0 * B.T @ G)
    step = S0 * (new - B @ A)
    assert float((step + rate * S0**2 * best).norm() / (rate * S0**2 * best.norm())) < 1e-3


def test_size_of_the_loss_does_not_matter():
    G = gradient()
    one, two = start(G), start(0.01 * G)
    assert torch.allclose(one.A, two.A, atol=1e-4)
    assert torch.allclose(one.B, two.B, atol=1e-4)


def test_rank_above_half_the_smaller_side_is_refused():
    with pytest.raises(UnsupportedInit, match=r"2r <= 48 here \(r = 25\)") as caught:
        start(gradient(), rank=25)
    assert caught.value.param == "lora.r"
    start(gradient(), rank=24)


@pytest.mark.parametrize("large", [True, False])
def test_norm_clip_keeps_the_offset_within_the_weights_largest_entry(large):
    G = gradient()
    free = start(G)
    offset = float((S0 * free.B @ free.A).abs().max())
    W = (2 if large else 0.25) * offset * torch.nn.functional.normalize(gradient(seed=5), p=torch.inf, dim=(0, 1))
    found = start(G, W=W, norm_clip=True)
    if large:
        assert torch.equal(found.A, free.A) and torch.equal(found.B, free.B)
        assert found.facts == {}
    else:
        assert float((S0 * found.B @ found.A).abs().max()) == pytest.approx(float(W.abs().max()), rel=1e-5)
        assert torch.allclose(found.A, free.A / 2, rtol=1e-4)  # the square root of a quarter, each
        assert torch.allclose(found.B, free.B / 2, rtol=1e-4)
        assert found.facts == {"norm_clip": pytest.approx(0.25, rel=1e-4)}
    assert start(G, W=W).facts == {}


def test_largest_entry_is_found_in_pieces(monkeypatch):
    A, B = gradient(3, 40), gradient(30, 3)
    monkeypatch.setitem(_largest_entry.__globals__, "ROWS", 7)
    assert _largest_entry(A, B) == pytest.approx(float((B @ A).abs().max()), rel=1e-6)


def test_rank_above_the_gradients_is_a_fact():
    U, S, Vh = torch.linalg.svd(gradient(), full_matrices=False)
    poor = (U[:, :5] * S[:5]) @ Vh[:5]
    assert start(poor, rank=4).facts == {"gradient_rank": 5}
    assert start(poor, rank=2).facts == {}


# --- against LoRA-One ----------------------------------------------------------------------------


def test_it_stays_where_lora_one_steps_and_its_offset_is_of_the_weights_own_size():
    found = context(tiny(), eight_rows(), {"method": "lora_ga", "samples": 8})
    evidence = collect(found.lora.method, found)
    factors = factors_of(found, evidence)
    assert loss_with(found, factors) == pytest.approx(loss_of(found), abs=1e-5)
    offsets = {n: found.lora.scaling * (f.B @ f.A) for n, f in factors.items()}
    for name, offset in offsets.items():
        G, W = evidence[name].gradient, weight_of(found.targets[name])
        assert abs(float((G * offset).sum() / (G.norm() * offset.norm()))) < 1e-6
        assert 1.7 < float(offset.norm() / W.norm()) < 2.6
    # The signs of U_{r+i} and V_i are independent: with other signs the largest entry was 0.80.
    assert 0.7 < max(float(o.abs().max()) for o in offsets.values()) < 1.1


# --- against PEFT --------------------------------------------------------------------------------

PROBE = slice(0, 4)


def logits(model):
    with torch.no_grad():
        return logits_of(model, collate(eight_rows()[PROBE], pad=0))


# PEFT counts gradients with a hook that torch warns about, and reads a name that transformers gave up.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


@pytest.fixture(scope="module")
def pefts(tmp_path_factory):
    """PEFT's own LoRA-GA: (logits of the base, of the adapted model, of the reloaded one, its factors)."""
    folder, model = tmp_path_factory.mktemp("peft"), tiny()
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(),
    )  # fmt: skip

    def train_step():
        for row in eight_rows():
            part = sum_losses(model, collate([row], pad=0))
            (part.loss / part.tokens).backward()

    before = logits(model)
    preprocess_loraga(model, config, train_step)
    wrapped = get_peft_model(copy.deepcopy(model), config)
    wrapped.save_pretrained(folder)
    adapted = logits(wrapped.eval())
    layer = wrapped.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    factors = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    with torch.random.fork_rng():
        again = logits(PeftModel.from_pretrained(tiny(), folder).eval())
    return before, adapted, again, factors


def ours(folder):
    """The same with our implementation: (logits of the base, adapted, reloaded by stock PEFT)."""
    found = context(
        tiny(), eight_rows(), {"method": "lora_ga", "samples": 8}, wanted=["q_proj", "v_proj", "down_proj"],
        alpha=16.0, use_rslora=False,
    )  # fmt: skip
    before, evidence = logits(found.model), collect(found.lora.method, found)
    probe = collate(eight_rows()[PROBE], pad=0)
    initialize(
        found.model, found.targets, found.lora, seed=0, probe=probe, evidence=evidence, on_event=lambda event: None
    )
    export(found.model, adapted_layers(found.model), folder, root="tests/tiny")
    return before, logits(found.model), logits(PeftModel.from_pretrained(tiny(), folder).eval())


def test_pefts_adapter_is_wrong_on_a_fresh_base_and_ours_is_right(pefts, tmp_path):
    before, adapted, again, _ = pefts
    assert float((adapted - before).abs().max()) < 1e-5
    assert float((again - adapted).abs().max()) > 0.1
    before, adapted, again = ours(tmp_path)
    assert float((adapted - before).abs().max()) < 1e-5
    assert float((again - adapted).abs().max()) < 1e-5


def test_pefts_factors_are_not_the_papers(pefts):
    A, B = pefts[3]
    assert float(A.norm()) == pytest.approx(math.sqrt(8), rel=1e-3)
    assert float(B.norm()) < 0.1
    found = context(tiny(), eight_rows(), {"method": "lora_ga", "samples": 8}, wanted=["q_proj"])
    factors = factors_of(found, collect(found.lora.method, found))["model.layers.0.self_attn.q_proj"]
    for factor in (factors.A, factors.B):
        assert float(factor.norm()) == pytest.approx(math.sqrt(8) * 64**0.25 / 4, rel=1e-4)
