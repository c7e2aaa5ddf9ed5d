"""Where stock PEFT 0.21 is measurably wrong: its result is off by this much, and ours on the same is right.

A failure of the first half of a test says that PEFT has changed, and that our reason is gone. LoRA-GA's
reload and the size of its factors are in `test_lora_ga.py`, EVA's scale under rsLoRA in `test_eva.py`.
"""

import copy
from dataclasses import replace

import pytest
import torch
from peft import EvaConfig, LoraConfig, LoraGAConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorainit.adapter import export
from lorainit.data import Sample, collate
from lorainit.evidence import Evidence
from lorainit.evidence.collect import collect
from lorainit.initialize import generator_for, initialize
from lorainit.layer import LoRALinear, adapted, disabled, weight_of
from lorainit.loss import logits_of, tally
from lorainit.methods import METHODS
from lorainit.spec import Lora
from tests.lorainit.reference import context, eight_rows, factors_of, tiny

# Stock PEFT's own warnings are not under test.
pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = ["q_proj", "v_proj", "down_proj"]
Q_PROJ = "model.layers.0.self_attn.q_proj"
R, ALPHA, S = 8, 16, 2.0
RIGHT = 1e-5  # logits of size 1
INITS = {
    "pissa": {"method": "pissa", "niter": None},
    "pissa_niter_4": {"method": "pissa", "niter": 4},
    "olora": {"method": "olora"},
    "lora_ga": {"method": "lora_ga", "samples": 8},
    "corda": {"method": "corda", "samples": 8},
}


@pytest.fixture(autouse=True)
def _own_random_state():
    """PEFT draws from the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def logits(model):
    with torch.no_grad():
        return logits_of(model, collate(eight_rows()[:4], pad=0))


def apart(one, other):
    return float((one - other).abs().max())


def shaken(parameters):
    """Stands for training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


# --- the two sides -----------------------------------------------------------------------------


def losses(model):
    for row in eight_rows():
        part = tally(model, collate([row], pad=0))
        yield part.loss / part.tokens


def gradients(model, config, *, factor=1.0):
    def step():
        for loss in losses(model):
            (factor * loss).backward()

    preprocess_loraga(model, config, step)


def moments(model, config, *, size=1, padding=0):
    """CorDA's calibration pass over the eight rows, `size` rows at a time, with padding on the right."""

    def run():
        for start in range(0, 8, size):
            rows = [collate([row], pad=0) for row in eight_rows()[start : start + size]]
            ids = torch.cat([nn.functional.pad(row.ids, (0, padding)) for row in rows])
            real = torch.cat([nn.functional.pad(row.attention, (0, padding)) for row in rows])
            model(input_ids=ids, attention_mask=real)

    preprocess_corda(model, config, run_model=run)


def pefts(init, **more):
    """A model that stock PEFT has adapted, by its name of the init; `more` goes to the pass that looks at data."""
    model = tiny()
    config = LoraConfig(
        r=R, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=init,
        lora_ga_config=LoraGAConfig() if init == "lora_ga" else None,
        corda_config=CordaConfig(corda_method="ipm") if init == "corda" else None,
    )  # fmt: skip
    if init == "lora_ga":
        gradients(model, config, **more)
    if init == "corda":
        moments(model, config, **more)
    return get_peft_model(model, config).eval()


def pefts_factors(model):
    layer = model.get_submodule(f"base_model.model.{Q_PROJ}")
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


def pefts_trained(init):
    model = pefts(init)
    shaken(parameter for name, parameter in model.named_parameters() if "lora_" in name)
    return model


def asked(init, rows=None, size=1):
    lora = {"r": R, "alpha": float(ALPHA), "use_rslora": False}
    return context(tiny(), rows or eight_rows(), init, wanted=TARGETS, size=size, **lora)


def ours(init):
    """The same adapter by our own hands."""
    found = asked(INITS.get(init, {"method": init}))
    evidence = collect(found.lora.method, found)
    probe = collate(eight_rows()[:4], pad=0)
    initialize(
        found.model, found.targets, found.lora, seed=0, probe=probe, evidence=evidence, on_event=lambda event: None
    )
    return found.model


def ours_trained(init, folder):
    """A trained adapter in `folder`, and its logits."""
    model = ours(init)
    shaken(p for layer in adapted(model).values() for p in layer.trained().values())
    export(model, folder, root="tests/tiny", rslora=False)
    return logits(model)


# --- the base model ----------------------------------------------------------------------------


@pytest.mark.parametrize("init", INITS)
def test_base_is_gone_after_peft_and_comes_back_after_ours(init):
    base, model = logits(tiny()), pefts(init)
    assert apart(logits(model), base) < RIGHT
    with model.disable_adapter():
        assert apart(logits(model), base) > 0.2
    model = ours(init)
    assert apart(logits(model), base) < RIGHT
    with disabled(model):
        assert torch.equal(logits(model), base)


# --- reloading ---------------------------------------------------------------------------------


def reload(folder, *, low=False):
    torch.manual_seed(99)
    return PeftModel.from_pretrained(tiny(), folder, low_cpu_mem_usage=low).eval()


def test_fast_pissa_of_peft_reloads_wrong_under_another_random_state(tmp_path):
    model = pefts_trained("pissa_niter_4")
    model.save_pretrained(tmp_path)
    assert apart(logits(reload(tmp_path)), logits(model)) > 0.3


def test_corda_of_peft_cannot_be_reloaded_without_its_calibration(tmp_path):
    pefts_trained("corda").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="preprocess_corda"):
        reload(tmp_path)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_peft_cannot_reload_a_changed_base_with_little_memory(init, tmp_path):
    pefts_trained(init).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="set_data"):
        reload(tmp_path, low=True)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("low", [False, True], ids=["plainly", "with little memory"])
def test_ours_reloads_under_another_random_state(init, low, tmp_path):
    trained = ours_trained(init, tmp_path)
    assert apart(logits(reload(tmp_path, low=low)), trained) < RIGHT


def test_two_raw_pissa_adapters_are_both_wrong_and_spoil_a_plain_one(tmp_path):
    trained = {}
    for name, init in {"one": "pissa", "two": "pissa", "plain": True}.items():
        model = pefts_trained(init)
        trained[name] = logits(model)
        model.save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(tiny(), tmp_path / "one", adapter_name="one")
    for name in ("two", "plain"):
        model.load_adapter(tmp_path / name, name)
    for name, expected in trained.items():
        model.set_adapter(name)
        assert apart(logits(model.eval()), expected) > 0.3, name


def test_ours_live_side_by_side(tmp_path):
    inits = ("pissa", "olora", "kaiming")
    trained = {init: ours_trained(init, tmp_path / init) for init in inits}
    model = PeftModel.from_pretrained(tiny(), tmp_path / "pissa", adapter_name="pissa")
    for init in inits[1:]:
        model.load_adapter(tmp_path / init, init)
    for init, expected in trained.items():
        model.set_adapter(init)
        assert apart(logits(model.eval()), expected) < RIGHT, init
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny()))


def test_peft_converts_dora_to_plain_lora_without_its_magnitudes_and_we_refuse(tmp_path):
    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights="pissa", use_dora=True)
    model = get_peft_model(tiny(), config).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    shaken(parameter for name, parameter in model.named_parameters() if "lora_" in name)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    assert apart(logits(PeftModel.from_pretrained(tiny(), tmp_path / "plain").eval()), logits(model)) > 0.05
    with pytest.raises(ValueError, match="lose DoRA's magnitudes"):
        Lora.model_validate({"init": "pissa", "use_dora": True})


# --- OLoRA -------------------------------------------------------------------------------------


def test_olora_of_peft_at_scale_2_reflects_the_base_and_ours_takes_the_leading_part_once():
    W = weight_of(tiny().get_submodule(Q_PROJ))
    Q, T = torch.linalg.qr(W)
    leading = Q[:, :R] @ T[:R]
    left = pefts("olora").get_submodule(f"base_model.model.{Q_PROJ}").base_layer.weight
    assert torch.allclose(left, W - S * leading, atol=1e-5)
    assert float(left.norm()) == pytest.approx(float(W.norm()), rel=1e-4)  # nothing was taken away
    layer = adapted(ours("olora"))[Q_PROJ]
    assert torch.allclose(S * layer.B0 @ layer.A0, leading, atol=1e-5)
    assert float((W - leading).norm()) < 0.9 * float(W.norm())


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
        W, Evidence(gradient=gradient), rank=4, scale=S, config=method, generator=generator_for(0, "x")
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
