import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from lorainit.config.errors import InitFailed, UnsupportedInit
from lorainit.config.events import Message, Tick
from lorainit.config.inits import INITS
from lorainit.config.spec import Lora
from lorainit.data.batches import collate
from lorainit.data.reader import load
from lorainit.init.evidence import Evidence
from lorainit.init.initialize import initialize
from lorainit.init.methods import METHODS
from lorainit.model.forward.loss import row_losses
from lorainit.model.layers.factors import Factors
from lorainit.model.layers.layer import LoRALinear, adapted_layers
from lorainit.model.load import load_model
from lorainit.model.targets.targets import find_targets
from tests.lorainit.conftest import make_tokenizer

CPU = torch.device("cpu")


@pytest.fixture
def probe(rows):
    return collate(load(rows, make_tokenizer(), max_length=256).samples[:4], pad=0)


@pytest.fixture
def model(bases):
    return load_model(bases["llama"], dtype=torch.float32, device=CPU)


def start(
    model, probe, init="loram", wanted="all-linear", on_event=lambda event: None, seed=3, decay=0.0, more=None, **lora
):
    resolved = Lora.model_validate({"init": init, "r": 4, **lora}).resolve()[0]
    targets = find_targets(model, wanted)
    return initialize(
        model, targets, resolved, seed=seed, probe=probe, weight_decay=decay, on_event=on_event, **(more or {})
    )


def gradients(model, batch):
    """Mean over rows of each row's gradient, as evidence."""
    targets = find_targets(model, "all-linear")
    for module in targets.values():
        module.weight.requires_grad_()
    row_losses(model, batch).mean().backward()
    found = {name: Evidence(gradient=module.weight.grad.clone(), rows=4) for name, module in targets.items()}
    for module in targets.values():
        module.weight.requires_grad_(requires_grad=False)  # type: ignore[call-arg]
        module.weight.grad = None
    return found


def test_report_has_the_shape_of_the_contract(model, probe):
    report = start(model, probe, "pissa")
    summary = report.summary
    assert summary["method"] == "pissa"
    assert (summary["seed"], summary["cached"], summary["samples"], summary["modules"]) == (3, False, None, 14)
    assert summary["function_preserving"] is True
    assert summary["initial_loss"] == pytest.approx(summary["base_loss"], abs=1e-5)
    assert summary["base_loss"] == pytest.approx(math.log(320), abs=1.5)
    assert summary["max_abs_logit_difference"] < 1e-4
    assert 0 < summary["captured_energy"]["min"] <= summary["captured_energy"]["mean"] <= 1
    assert [c["name"] for c in summary["checks"]] == ["initial_loss_equals_base"]
    assert summary["warnings"] == []
    assert summary["peak_memory_bytes"] > 0


def test_modules_are_reported_with_true_norms_and_energy(model, probe):
    report = start(model, probe, "pissa")
    for facts in report.modules:
        layer = adapted_layers(model)[facts["name"]]
        W = layer.base.weight
        product = (layer.scale * layer.B @ layer.A).detach()
        assert facts["weight_norm"] == pytest.approx(float(W.norm()), rel=1e-5)
        assert facts["product_norm"] == pytest.approx(float(product.norm()), rel=1e-4)
        share = 1 - float((W - product).square().sum() / W.square().sum())  # true for projections of W
        assert facts["captured_energy"] == pytest.approx(share, abs=1e-4)


def test_ranks_and_scales_are_in_the_report(model, probe):
    evidence = {}
    for number, (name, module) in enumerate(find_targets(model, "all-linear").items()):
        width = module.weight.shape[1]
        evidence[name] = Evidence(directions=torch.eye(width)[:8], spread=torch.ones(8), rank=2 + 4 * (number % 2))
    report = start(model, probe, "eva", more={"evidence": evidence}, alpha=8.0)
    assert {m["rank"] for m in report.modules} == {2, 6}
    assert {m["scale"] for m in report.modules} == {2.0}
    assert report.summary["ranks"] == {"min": 2, "max": 6, "sum": 7 * 2 + 7 * 6}
    assert report.summary["rank_pattern"] == {m["name"]: m["rank"] for m in report.modules}


def test_gradient_alignment_is_the_share_a_first_step_can_follow(model, probe):
    """Against its definition with full projectors, and at its optimum for LoRA-GA's directions."""
    evidence = gradients(model, probe)
    report = start(model, probe, "lora_ga", more={"evidence": evidence})
    for facts in report.modules:
        layer, G = adapted_layers(model)[facts["name"]], evidence[facts["name"]].gradient.double()
        A, B = layer.A.detach().double(), layer.B.detach().double()
        P_A, P_B = torch.linalg.pinv(A) @ A, B @ torch.linalg.pinv(B)
        outside = (torch.eye(len(P_B)) - P_B) @ G @ (torch.eye(len(P_A)) - P_A)
        assert facts["gradient_alignment"] == pytest.approx(
            1 - float(outside.square().sum() / G.square().sum()), abs=1e-5
        )
        S = torch.linalg.svdvals(G)
        assert facts["gradient_alignment"] == pytest.approx(float(S[:8].square().sum() / S.square().sum()), abs=1e-3)
        assert facts["gradient_norm"] == pytest.approx(float(G.norm()), rel=1e-5)
    assert report.summary["samples"] == 4


def test_expected_first_step_is_what_the_loss_does_along_it(model, probe):
    """The slope against a finite difference of the real loss along the sign of the gradient, Adam's first step."""
    evidence = gradients(model, probe)
    report = start(model, probe, "lora_ga", more={"evidence": evidence, "rate": 1e-6})
    layers = adapted_layers(model).values()
    loss = row_losses(model, probe).mean()
    loss.backward()
    slope = -sum(float(p.grad.abs().sum()) for layer in layers for p in (layer.A, layer.B))
    assert report.summary["expected_first_step_change"] == pytest.approx(1e-6 * slope, rel=1e-3)


def displaced(model, probe, gamma, on_event=lambda event: None, sign=1):
    init, evidence = {"method": "lora_one", "gamma": gamma}, gradients(model, probe)
    evidence = {name: replace(found, gradient=sign * found.gradient) for name, found in evidence.items()}
    return start(model, probe, init, on_event=on_event, more={"evidence": evidence, "calibration": [probe]})


def test_displaced_start_reports_the_loss_before_and_after_on_its_rows(model, probe):
    before = float(row_losses(model, probe).mean())
    summary = displaced(model, probe, 1024.0).summary
    assert summary["checks"] == []
    assert summary["warnings"] == []
    loss = summary["calibration_loss"]
    assert (loss["before"], loss["rows"]) == (pytest.approx(before, rel=1e-6), 4)
    assert loss["after"] == pytest.approx(float(row_losses(model, probe).mean().detach()), rel=1e-6)
    assert loss["after"] - before == pytest.approx(summary["expected_displacement_change"], rel=0.3)


def test_displaced_start_that_raises_the_loss_warns_with_the_remedy(model, probe):
    events = []
    summary = displaced(model, probe, 16.0, events.append, sign=-1).summary
    assert summary["calibration_loss"]["after"] > summary["calibration_loss"]["before"]
    (text,) = summary["warnings"]
    assert 'gamma "auto"' in text
    assert [e.message for e in events if isinstance(e, Message) and e.level == "warn"] == [text]


def test_displaced_start_that_breaks_the_model_fails(model, probe):
    with pytest.raises(InitFailed, match="not finite"):
        displaced(model, probe, 1e-38)


def test_every_layer_ticks_and_the_last_is_said(model, probe):
    events = []
    start(model, probe, on_event=events.append)
    assert [(e.done, e.total) for e in events if isinstance(e, Tick)] == [(i, 14) for i in range(1, 15)]
    said = [e for e in events if isinstance(e, Message)]
    assert said[-1].data == {"kind": "init", "done": 14, "total": 14}


def test_factors_of_a_module_do_not_depend_on_the_other_targets(bases, probe):
    found = []
    for wanted in ("all-linear", ["v_proj"]):
        model = load_model(bases["llama"], dtype=torch.float32, device=CPU)
        start(model, probe, "kaiming", wanted)
        found.append(adapted_layers(model)["model.layers.1.self_attn.v_proj"].A)
    assert torch.equal(*found)


def test_modules_of_one_shape_get_different_random_factors(model, probe):
    start(model, probe, "kaiming")
    layers = adapted_layers(model)
    one, two = (layers[f"model.layers.{i}.self_attn.q_proj"].A for i in (0, 1))
    assert not torch.equal(one, two)


def test_seed_of_the_method_wins_over_the_runs(bases, probe):
    found = []
    for seed in (1, 2):
        model = load_model(bases["llama"], dtype=torch.float32, device=CPU)
        report = start(model, probe, {"method": "kaiming", "seed": 9}, seed=seed)
        found.append(next(iter(adapted_layers(model).values())).A)
    assert torch.equal(*found)
    assert report.summary["seed"] == 9


def spoil(model, how):
    module = model.get_submodule("model.layers.1.mlp.up_proj")
    if how == "nan":
        module.weight.data[0, 0] = float("nan")
    elif how == "zero":
        module.weight.data.zero_()
    elif how == "meta":
        module.to_empty(device="meta")
    else:
        module.weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("how", "text"), [("nan", "non-finite"), ("zero", "zero"), ("meta", "not been loaded"), ("int8", "quantized")]
)
def test_weight_no_method_can_use_is_refused_by_name(model, probe, how, text):
    spoil(model, how)
    with pytest.raises(UnsupportedInit, match=rf"model\.layers\.1\.mlp\.up_proj: .*{text}"):
        start(model, probe, "loram")


def test_refusal_of_a_method_names_the_module(model, probe):
    model.get_submodule("model.layers.0.self_attn.o_proj").weight.data.fill_(0.5)
    with pytest.raises(UnsupportedInit, match=r"model\.layers\.0\.self_attn\.o_proj: all entries"):
        start(model, probe, "loram")


def test_zero_weight_is_fine_for_a_method_that_does_not_look_at_it(model, probe):
    spoil(model, "zero")
    start(model, probe, "kaiming")


def test_method_that_moves_the_function_fails(model, probe, monkeypatch):
    def displaced(weight, evidence, *, rank, scale, config, generator):
        return Factors(A=torch.ones(rank, weight.shape[1]), B=torch.ones(weight.shape[0], rank))

    monkeypatch.setitem(METHODS, "kaiming", displaced)
    with pytest.raises(InitFailed, match="promises to start as the base model"):
        start(model, probe, "kaiming")


def test_method_that_returns_nan_fails_by_name(model, probe, monkeypatch):
    def broken(weight, evidence, *, rank, scale, config, generator):
        return Factors(A=torch.full((rank, weight.shape[1]), float("nan")), B=torch.zeros(weight.shape[0], rank))

    monkeypatch.setitem(METHODS, "kaiming", broken)
    with pytest.raises(InitFailed, match=r"q_proj: kaiming produced non-finite"):
        start(model, probe, "kaiming")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"init": "gaussian"}, "norm"),
        ({"init": "loram", "alpha": 12.0}, "9 times"),
        ({"init": "pissa", "decay": 0.1}, "weight decay"),
    ],
)
def test_risky_choices_are_warned_about(model, probe, options, text):
    events = []
    report = start(model, probe, on_event=events.append, **options)
    assert text in report.summary["warnings"][0]
    assert any(isinstance(e, Message) and e.level == "warn" and text in e.message for e in events)


@pytest.mark.parametrize(("init", "wanted"), [("lora_ga", "2r = 8"), ("lora_one", "r = 4")])
def test_gradient_of_too_few_directions_is_warned_about_with_the_module(model, probe, init, wanted):
    evidence = gradients(model, probe)
    name = "model.layers.0.mlp.up_proj"
    G = evidence[name].gradient
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    evidence[name] = replace(evidence[name], gradient=(U[:, :3] * S[:3]) @ Vh[:3])
    events = []
    report = start(model, probe, init, on_event=events.append, more={"evidence": evidence, "calibration": [probe]})
    (text,) = (t for t in report.summary["warnings"] if "fewer directions" in t)
    assert f"({wanted}), down to 3 in {name}" in text
    assert any(isinstance(e, Message) and e.level == "warn" and e.message == text for e in events)
    assert next(m for m in report.modules if m["name"] == name)["gradient_rank"] == 3


@pytest.mark.parametrize(
    "lora", [{}, {"use_rslora": True}, {"init": {"method": "loram", "scale_aware": True}, "alpha": 12.0}]
)
def test_the_papers_own_settings_raise_no_warning(model, probe, lora):
    assert start(model, probe, **lora).summary["warnings"] == []


def test_dropout_with_an_offset_is_refused():
    factors = Factors(A=torch.ones(2, 4), B=torch.ones(3, 2))
    with pytest.raises(ValueError, match="cancel"):
        LoRALinear(nn.Linear(4, 3), factors, scale=1.0, subtract=True, dropout=0.1)


def test_a_start_that_is_computed_has_the_same_seed_in_every_run():
    loftq = INITS["loftq"].model_validate({"method": "loftq"})
    assert (loftq.randomness, loftq.seed_for(1)) == ("nothing", loftq.seed_for(2))


@pytest.mark.parametrize("method", ["kaiming", "gaussian", "orthogonal", "pissa", "milora", "olora", "loram"])
def test_the_seed_changes_exactly_what_is_drawn(bases, probe, method):
    def factors(seed):
        model = load_model(bases["llama"], dtype=torch.float32, device=CPU)
        start(model, probe, method, seed=seed)
        return [layer.A for layer in adapted_layers(model).values()]

    same = all(torch.equal(one, other) for one, other in zip(factors(0), factors(1), strict=True))
    assert same == (method not in ("kaiming", "gaussian", "orthogonal"))
    assert same == (INITS[method].model_validate({"method": method}).randomness == "nothing")
