"""EVA: incremental components, the spread of ranks, and an export of mixed ranks at one scale."""

import json
import math
import warnings

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.eva import initialize_lora_eva_weights

from lorainit.config.errors import InitFailed, UnsupportedInit
from lorainit.config.events import Message
from lorainit.config.inits.data import EVA
from lorainit.config.spec import Lora
from lorainit.data.batches import collate
from lorainit.export.check import check, make_prompts
from lorainit.export.effect import observe
from lorainit.export.peft_adapter import export
from lorainit.init.collectors import directions as eva_directions
from lorainit.init.collectors.collect import collect
from lorainit.init.collectors.pca import PCA, has_converged, spread_ranks
from lorainit.init.evidence import Evidence
from lorainit.init.initialize import initialize
from lorainit.init.methods import METHODS
from lorainit.model.layers.layer import adapted_layers, detach
from lorainit.model.load import load_model
from lorainit.run import run
from tests.lorainit.contexts import CPU, make_context

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tokens(spectrum, count=6144, n=256, mean=0.0, noise=0.0, seed=0):
    """`count` Gaussian inputs whose covariance has these standard deviations in random directions."""
    g = generator(seed)
    V = torch.linalg.qr(torch.randn(n, len(spectrum), generator=g, dtype=F64)).Q
    X = torch.randn(count, len(spectrum), generator=g, dtype=F64) * torch.tensor(spectrum, dtype=F64) @ V.T
    return (
        X + noise * torch.randn(count, n, generator=g, dtype=F64) + mean * torch.randn(n, generator=g, dtype=F64)
    ), V


def components(X, k, sizes=512):
    pca = PCA(k, generator=generator())
    for piece in X.float().split(sizes):
        pca.update(piece)
    return pca


def sine(V, U):
    """Sine of the largest angle between the spaces of the rows of V and of U, equally many."""
    V, U = torch.linalg.qr(V.double().T).Q, torch.linalg.qr(U.double().T).Q
    return float(torch.linalg.matrix_norm(U - V @ (V.T @ U), ord=2))


def one_shot(X, k, centred=True):
    X = X - X.mean(0) if centred else X
    squares, V = torch.linalg.eigh(X.T @ X)
    return squares[-k:].flip(0).sqrt(), V[:, -k:].T.flip(0)


HARMONIC = [1 / (i + 1) for i in range(256)]


# --- components --------------------------------------------------------------------------------


def test_planted_directions_are_recovered():
    X, V = tokens([1.0] * 8, noise=1e-3, mean=3.0)
    assert sine(components(X, 16).directions[:8], V.T) < 1e-3


@pytest.mark.parametrize(
    ("spectrum", "noise", "tolerance"), [([1.0] * 8, 1e-3, 2e-5), (HARMONIC, 0.0, 0.05)], ids=["planted", "harmonic"]
)
def test_incremental_is_one_shot_centred_pca(spectrum, noise, tolerance):
    X, _ = tokens(spectrum, noise=noise, mean=1.0)
    pca = components(X, 16)
    S, V = one_shot(X, 8)
    assert sine(pca.directions[:8], V) < tolerance
    assert torch.allclose(pca.S[:8].double(), S, rtol=1e-3)
    total = float((X - X.mean(0)).square().sum())
    assert pca.total == pytest.approx(total, rel=1e-4)
    assert torch.allclose(pca.ratios[:8], S.square() / total, rtol=2e-3)
    assert torch.allclose(pca.mean.double(), X.mean(0), atol=1e-5)
    assert (pca.directions @ pca.directions.T - torch.eye(16)).abs().max() < 1e-5


def test_centring_is_essential():
    X, _ = tokens(HARMONIC, mean=1.0)
    centred, raw = one_shot(X, 8)[1], one_shot(X, 8, centred=False)[1]
    assert sine(raw, centred) > 0.99
    assert sine(components(X, 16).directions[:8], centred) < 0.05


def test_batches_shorter_than_the_directions_count_too():
    X, V = tokens([3.0, 2.0, 1.0], count=90, n=24, mean=1.0)
    pca = components(X, 6, sizes=4)
    assert pca.tokens == 90
    assert sine(pca.directions[:3], V.T) < 1e-3
    pca.update(torch.zeros(0, 24))
    assert pca.tokens == 90


def test_directions_that_turn_within_their_span_have_converged():
    V = torch.linalg.qr(torch.randn(16, 4, generator=generator())).Q.T
    turned = torch.cat([(V[:1] + V[1:2]) / 2**0.5, (V[:1] - V[1:2]) / 2**0.5, V[2:]])
    assert has_converged(V, turned, 2, 0.99)
    assert not has_converged(V, turned, 1, 0.99)
    assert has_converged(V, -V, 4, 0.99)
    assert not has_converged(V[:2], V, 3, 0.0)
    assert has_converged(V[:0], V[:0], 0, 0.99)


# --- ranks -------------------------------------------------------------------------------------


def test_ranks_go_to_the_largest_ratios_and_add_up():
    bids = {"a": [0.5, 0.3, 0.1, 0.05], "b": [0.2, 0.15, 0.02, 0.01], "c": [0.01, 0.01, 0.01, 0.01]}
    ranks = spread_ranks({n: torch.tensor(v) for n, v in bids.items()}, 6)
    assert ranks == {"a": 4, "b": 2, "c": 0}


def test_equal_ratios_go_to_the_earlier_layer():
    same = torch.tensor([0.5, 0.2])
    assert spread_ranks({"q": same, "k": same, "v": same}, 4) == {"q": 2, "k": 1, "v": 1}


@pytest.mark.parametrize("base", ["llama", "gpt2"])
@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_ranks_add_up_to_r_times_layers_and_stay_below_rho_r(bases, rows, base, rho):
    context = make_context(bases[base], rows, {"method": "eva", "rho": rho})
    evidence = collect(context.lora.method, context)
    ranks = [e.rank for e in evidence.values()]
    assert sum(ranks) == 4 * len(ranks)
    assert max(ranks) <= rho * 4
    assert (len(set(ranks)) == 1) == (rho == 1.0)
    assert all(len(e.directions) == len(e.spread) == e.rank for e in evidence.values())


# --- the factors -------------------------------------------------------------------------------


def start(evidence, rank=4, m=24, n=32, **options):
    config = EVA(method="eva", **options)
    return METHODS["eva"](torch.zeros(m, n), evidence, rank=rank, scale=2.0, config=config, generator=generator())


def directions(k=8, n=32):
    V = torch.linalg.qr(torch.randn(n, k, generator=generator())).Q.T.contiguous()
    return Evidence(directions=V, spread=torch.arange(k, 0, -1.0))


def test_a_has_the_directions_as_orthonormal_rows_and_b_is_zero():
    found = start(directions())
    assert torch.equal(found.A, directions().directions[:4])
    assert (found.A @ found.A.T - torch.eye(4)).abs().max() < 1e-6
    assert found.B.shape == (24, 4)
    assert not found.B.any()


def test_whitening_divides_by_the_root_of_the_singular_value():
    found = start(directions(), whiten=True)
    assert torch.allclose(found.A.norm(dim=1), torch.tensor([8.0, 7.0, 6.0, 5.0]) ** -0.5)


def test_rank_zero_gives_empty_factors():
    found = start(directions(0), rank=0)
    assert (found.A.shape, found.B.shape) == ((0, 32), (24, 0))


def test_missing_or_too_few_directions_are_refused():
    with pytest.raises(InitFailed, match="none were collected"):
        start(Evidence())
    with pytest.raises(InitFailed, match="vary in 3 directions, fewer than the rank 4"):
        start(directions(3))
    flat = directions()
    flat = Evidence(directions=flat.directions, spread=torch.tensor([1.0, 1e-3, 1e-8, 0, 0, 0, 0, 0]))
    with pytest.raises(InitFailed, match="vary in 2 directions"):
        start(flat)


# --- the stage ---------------------------------------------------------------------------------


def test_too_few_tokens_are_refused_with_the_layers(bases, rows):
    context = make_context(bases["llama"], rows, {"method": "eva", "samples": 1})
    with pytest.raises(UnsupportedInit, match=r"model\.layers\.0\.self_attn\.q_proj, .* and 9 more got \d+"):
        collect(context.lora.method, context)


def test_directions_that_never_stand_still_are_refused_with_the_layers(bases, rows, monkeypatch):
    calls = []
    monkeypatch.setattr(eva_directions, "has_converged", lambda *a: bool(calls.append(1)))
    context = make_context(bases["llama"], rows, "eva")
    with pytest.raises(InitFailed, match=r"still change after 64 batches in model\.layers\.0\.self_attn\.q_proj, "):
        collect(context.lora.method, context)


def test_every_row_is_seen_before_convergence_counts(bases, rows):
    events = []
    context = make_context(bases["llama"], rows, {"method": "eva", "tau": 0.0}, size=2, on_event=events.append)
    collect(context.lora.method, context)
    (said,) = [e for e in events if isinstance(e, Message) and e.level == "info"]
    assert said.data == {"kind": "init", "batches": 6, "without_adapter": []}


def test_only_trained_tokens_count(bases, rows):
    context = make_context(bases["llama"], rows, {"method": "eva", "rho": 1.0}, size=12, wanted=["q_proj"])
    name = "model.layers.0.self_attn.q_proj"
    inputs = []
    handle = context.targets[name].register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    batch = collate(context.samples, pad=0)
    with torch.no_grad():
        context.model(input_ids=batch.ids, attention_mask=batch.attention)
    handle.remove()
    found = collect(context.lora.method, context)[name].directions
    assert sine(found, one_shot(inputs[0][batch.trained].double(), 4)[1]) < 0.05
    assert sine(found, one_shot(inputs[0][batch.attention.bool()].double(), 4)[1]) > 0.2
    init = {"method": "eva", "rho": 1.0, "use_label_mask": False}
    context = make_context(bases["llama"], rows, init, size=12, wanted=["q_proj"])
    found = collect(context.lora.method, context)[name].directions
    assert sine(found, one_shot(inputs[0][batch.attention.bool()].double(), 4)[1]) < 0.05


# --- scale, export, runs -----------------------------------------------------------------------


def initialized(bases, rows, base="llama", change=None, **lora):
    context = make_context(bases[base], rows, "eva")
    evidence = collect(context.lora.method, context)
    if change:
        change(evidence)
    lora = Lora.model_validate({"init": "eva", "r": 4, **lora}).resolve()[0]
    report = initialize(
        context.model, context.targets, lora, seed=3, probe=collate(context.samples[:4], pad=0), evidence=evidence,
        on_event=lambda event: None,
    )  # fmt: skip
    g = generator(9)
    for layer in adapted_layers(context.model).values():
        with torch.no_grad():
            layer.B.copy_(0.2 * torch.randn(layer.B.shape, generator=g))
    return context, lora, report


def without(name, other):
    """Take one layer's rank away and give it to another layer, as redistribution may."""

    def change(evidence):
        V, S = evidence[other].directions, evidence[other].spread
        evidence[name] = Evidence(directions=V[:0, : evidence[name].directions.shape[1]], spread=S[:0], rank=0)

    return change


SCALINGS = [{"alpha": 4.0}, {"alpha": 16.0}, {"alpha": 16.0, "use_rslora": True}]
USUAL = [("padded", "llama", 1), ("pattern", "llama", 2), ("padded", "gpt2", 2), ("pattern", "gpt2", 0)]


@pytest.mark.parametrize(
    ("written", "base", "scaling"),
    [
        pytest.param(written, base, scaling, marks=() if (written, base, number) in USUAL else pytest.mark.slow)
        for written in ("padded", "pattern")
        for base in ("llama", "gpt2")
        for number, scaling in enumerate(SCALINGS)
    ],
)
def test_stock_peft_loads_mixed_ranks_at_one_scale(bases, rows, tmp_path, base, written, scaling):
    names = {
        "llama": ("model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.q_proj"),
        "gpt2": ("transformer.h.1.attn.c_proj", "transformer.h.0.attn.c_proj"),
    }
    empty = names[base][0]
    context, lora, report = initialized(bases, rows, base, change=without(*names[base]), **scaling)
    assert next(m for m in report.modules if m["name"] == empty)["rank"] == 0
    largest = export(context.model, adapted_layers(context.model), tmp_path, root="tests/base", ranks=written)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    ranks = {n: len(layer.A) for n, layer in adapted_layers(context.model).items()}
    assert largest == config["r"] == max(ranks.values())
    pattern = {n: r for n, r in ranks.items() if r not in (0, largest)}
    assert pattern
    assert config["rank_pattern"] == (pattern if written == "pattern" else {})
    assert config["rank_pattern"].keys() == config["alpha_pattern"].keys()
    assert config["use_rslora"] is False

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(load_model(bases[base], dtype=torch.float32, device=CPU), tmp_path)
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert layers.keys() == {n for n, r in ranks.items() if r}
    assert all(m.scaling["default"] == pytest.approx(lora.scaling, rel=1e-12) for m in layers.values())
    ours = detach(context.model)
    effect = observe(context.model, ours, make_prompts(context.samples), divided=False, on_event=lambda e: None)
    result, _ = check(
        load_model(bases[base], dtype=torch.float32, device=CPU), tmp_path, effect, source_rank=4, base_sha256="x",
        on_event=lambda e: None,
    )  # fmt: skip
    assert result["passed"]
    assert result["modules"] == len(layers)
    assert result["max_abs_logit_difference"] < 1e-9


def test_scale_of_peft_drifts_with_the_rank_under_rslora_and_ours_does_not(bases, rows):
    """PEFT multiplies alpha by rank/r, which keeps alpha/rank but not alpha/sqrt(rank)."""
    context = make_context(bases["llama"], rows, "eva", r=8)
    batch = collate(context.samples, pad=0)
    config = LoraConfig(
        r=8, lora_alpha=16, use_rslora=True, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0),
        target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM",
    )  # fmt: skip
    feed = [{"input_ids": batch.ids, "attention_mask": batch.attention}] * 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load_model(bases["llama"], dtype=torch.float32, device=CPU), config)
        initialize_lora_eva_weights(model, feed, show_progress_bar=False)
    scales = {round(m.scaling["default"], 3) for m in model.modules() if hasattr(m, "lora_A") and m.scaling}
    asked = 16 / 8**0.5
    assert max(abs(s - asked) for s in scales) > 0.3

    context, lora, report = initialized(bases, rows, alpha=16.0, r=8, use_rslora=True)
    assert len({m["rank"] for m in report.modules}) > 1
    assert {layer.scale for layer in adapted_layers(context.model).values()} == {lora.scaling} == {asked}


@pytest.mark.usefixtures("training_only")
@pytest.mark.parametrize(
    ("base", "written"),
    [("llama", "padded"), ("llama", "pattern"), pytest.param("gpt2", "padded", marks=pytest.mark.slow)],
)
def test_run_starts_as_the_base_and_its_export_reloads(spec, tmp_path, base, written):
    done = run(spec(base, lora={"init": {"method": "eva", "export_ranks": written}}), tmp_path, lambda event: None)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert bool(config["rank_pattern"]) == (written == "pattern")
    report = json.loads((tmp_path / "adapter/init_report.json").read_text())
    assert report["max_abs_logit_difference"] == 0.0
    assert report["samples"] == 12
    assert sum(m["rank"] for m in report["per_module"]) == 4 * len(report["per_module"])
    assert done.export_check["passed"]
    assert done.export_check["export_rank"] == max(m["rank"] for m in report["per_module"])


def test_run_with_a_layer_of_rank_zero_trains_resumes_and_exports(spec, tmp_path, monkeypatch):
    empty = "model.layers.0.self_attn.k_proj"

    def spread(bids, slots):
        return {name: 0 if name == empty else 4 for name in bids}

    monkeypatch.setattr(eva_directions, "spread_ranks", spread)
    whole = run(spec(lora={"init": "eva"}), tmp_path / "1", lambda event: None)
    assert whole.export_check["passed"]
    report = json.loads((tmp_path / "1/adapter/init_report.json").read_text())
    plan = json.loads((tmp_path / "1/adapter/manifest.json").read_text())["plan"]
    assert plan["trainable_parameters_estimated"] is True
    assert report["trainable_parameters"] == plan["trainable_parameters"] - 4 * (16 + 32)
    assert math.isfinite(whole.export_check["max_abs_logit_difference"])
    again = spec(lora={"init": "eva"}, resume_from=str(tmp_path / "1/checkpoints/step-000002"))
    run(again, tmp_path / "2", lambda event: None)
    files = [(tmp_path / n / "adapter/adapter_model.safetensors").read_bytes() for n in "12"]
    assert files[0] == files[1]
    assert b"layers.0.self_attn.k_proj" not in files[0]
