"""DoRA: the same function and gradients as stock PEFT's layer, and what is ours around it."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorainit.config.errors import UnsupportedInit
from lorainit.config.events import InitReport, Plan
from lorainit.config.inits import INITS
from lorainit.config.spec import Lora
from lorainit.data.batches import collate
from lorainit.data.reader import load
from lorainit.init.evidence import Evidence
from lorainit.init.initialize import initialize
from lorainit.model.forward.loss import row_losses
from lorainit.model.layers.factors import Factors
from lorainit.model.layers.layer import LoRALinear, adapted_layers
from lorainit.model.layers.weight import weight_of
from lorainit.model.load import load_model
from lorainit.model.targets.targets import find_targets
from lorainit.run import run
from lorainit.train.optimizers import make_optimizer
from tests.lorainit.conftest import make_tokenizer
from tests.lorainit.init.test_initialize import gradients
from tests.lorainit.stock_peft import SameMask
from tests.lorainit.train.test_optimizers import OPTIMIZERS, recipe
from tests.lorainit.train.test_optimizers import layer as trainee

CPU = torch.device("cpu")
IN, OUT, R, S = 12, 20, 3, 1.7
BASES = {
    "linear": lambda: nn.Linear(IN, OUT),
    "linear without bias": lambda: nn.Linear(IN, OUT, bias=False),
    "conv1d": lambda: Conv1D(OUT, IN),
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def base(kind):
    module = BASES[kind]().requires_grad_(requires_grad=False)
    for number, parameter in enumerate(module.parameters()):
        parameter.copy_(normal(*parameter.shape, seed=10 + number))
    return module


def ours(kind="linear", *, scale=S, dropout=0.0, dtype=torch.float32):
    """A layer away from its start: other factors and magnitudes than it began with."""
    factors = Factors(A=normal(R, IN), B=0.3 * normal(OUT, R, seed=1))
    layer = LoRALinear(base(kind).to(dtype), factors, scale=scale, subtract=False, dropout=dropout, dora=True)
    with torch.no_grad():
        layer.A += 0.2 * normal(R, IN, seed=2)
        layer.B += 0.2 * normal(OUT, R, seed=3)
        layer.magnitude *= 1 + 0.3 * normal(OUT, seed=4)
    return layer


def pefts(kind, layer, *, dropout=0.0):
    """Stock PEFT's layer with the same tensors, and its A, B and magnitude."""
    config = LoraConfig(
        r=R, lora_alpha=S * R, target_modules=["x"], use_dora=True, lora_dropout=dropout,
        fan_in_fan_out=kind == "conv1d",
    )  # fmt: skip
    found = get_peft_model(nn.ModuleDict({"x": base(kind)}), config).base_model.model["x"]
    theirs = {
        "A": found.lora_A["default"].weight,
        "B": found.lora_B["default"].weight,
        "magnitude": found.lora_magnitude_vector["default"].weight,
    }
    with torch.no_grad():
        for name, parameter in layer.trained_parameters().items():
            theirs[name].copy_(parameter)
    return found, theirs


# --- the layer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", BASES)
def test_forward_and_gradients_are_stock_pefts(kind, dropout):
    layer = ours(kind, dropout=dropout)
    theirs, parameters = pefts(kind, layer, dropout=dropout)
    layer.dropout.key = "a step of a run"
    theirs.lora_dropout["default"] = SameMask(layer)
    outputs = []
    for module, trained in ((layer, layer.trained_parameters()), (theirs, parameters)):
        x = normal(2, 5, IN, seed=5).requires_grad_()
        y = module.train()(x)
        gradients = torch.autograd.grad((y * normal(2, 5, OUT, seed=6)).sum(), [x, *trained.values()])
        outputs.append([y, *gradients])
    assert (outputs[0][0] - base(kind)(normal(2, 5, IN, seed=5))).abs().max() > 0.5
    for name, a, b in zip(("y", "x", *parameters), *outputs, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("kind", BASES)
def test_the_weight_has_the_magnitudes_as_row_norms_and_the_direction_of_w_plus_s_b_a(kind):
    layer = ours(kind)
    with torch.no_grad():
        effective = (layer(torch.eye(IN)) - layer(torch.zeros(1, IN))).T
        direction = weight_of(layer.base) + S * layer.B @ layer.A
    assert torch.allclose(effective.norm(dim=1), layer.magnitude, rtol=1e-5)
    assert torch.allclose(torch.cosine_similarity(effective, direction, dim=1), torch.ones(OUT), atol=1e-6)


def test_norm_is_a_constant_to_the_gradient():
    """Section 4.3: as if ‖W + s·B·A‖ were numbers. The full gradient is another one."""
    layer, x, weights = ours(), normal(5, IN, seed=5), normal(5, OUT, seed=6)
    (layer(x) * weights).sum().backward()

    def gradient(*, constant):
        B = layer.B.detach().requires_grad_()
        W = layer.base.weight + S * B @ layer.A.detach()
        norms = W.norm(dim=1)
        g = layer.magnitude.detach() / (norms.detach() if constant else norms)
        ((x @ (g[:, None] * W).T + layer.base.bias) * weights).sum().backward()
        return B.grad

    assert torch.allclose(layer.B.grad, gradient(constant=True), rtol=1e-5, atol=1e-5)
    assert (layer.B.grad - gradient(constant=False)).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_start_is_w_plus_s_b0_a0_and_with_b_zero_the_base_bit_for_bit(dtype):
    A, B, x = normal(R, IN), 0.3 * normal(OUT, R, seed=1), normal(5, IN, seed=5).to(dtype)
    module = base("linear").to(dtype)
    nothing = LoRALinear(module, Factors(A=A, B=torch.zeros(OUT, R)), scale=S, subtract=False, dora=True)
    assert torch.equal(nothing(x), module(x))
    displaced = LoRALinear(module, Factors(A=A, B=B), scale=S, subtract=False, dora=True)
    plain = LoRALinear(module, Factors(A=A, B=B), scale=S, subtract=False)
    # In bf16 the plain layer rounds once what DoRA, like PEFT, adds to a rounded W·x: half a unit of the inner sums.
    rounding = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 5e-2}
    assert torch.allclose(displaced(x), plain(x), **rounding)
    assert displaced.magnitude.dtype == torch.float32
    assert torch.allclose(displaced.magnitude, (module.weight.float() + S * B @ A).norm(dim=1), rtol=1e-6)


def test_disabled_layer_is_the_base_and_a_layer_of_rank_0_has_no_magnitude():
    layer, x = ours(), normal(5, IN, seed=5)
    layer.enabled = False
    assert torch.equal(layer(x), layer.base(x))
    empty = LoRALinear(
        base("linear"), Factors(A=torch.zeros(0, IN), B=torch.zeros(OUT, 0)), scale=S, subtract=False, dora=True
    )
    assert set(empty.trained_parameters()) == {"A", "B"}
    assert torch.equal(empty(x), empty.base(x))


def test_magnitudes_do_not_combine_with_an_offset():
    with pytest.raises(ValueError, match="magnitudes"):
        LoRALinear(base("linear"), Factors(A=normal(R, IN), B=normal(OUT, R)), scale=S, subtract=True, dora=True)


# --- the optimizers ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_magnitudes_move_by_plain_adamw_at_as_rate_without_decay(name):
    def factors():
        return nn.Parameter(normal(R, IN)), nn.Parameter(normal(OUT, R))

    layer, reference = trainee(*factors(), nn.Parameter(normal(OUT, seed=4))), nn.Parameter(normal(OUT, seed=4))  # type: ignore[call-arg]
    optimizer = make_optimizer(recipe(name, weight_decay=0.3), {"x": layer, "of rank 0": trainee(*factors())})
    theirs = torch.optim.AdamW([reference], lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for step in range(4):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = normal(*parameter.shape, seed=20 + step)
        reference.grad = normal(OUT, seed=20 + step)
        optimizer.step()
        theirs.step()
    assert torch.equal(layer.magnitude, reference)
    assert set(optimizer.state[layer.magnitude]) == {"step", "exp_avg", "exp_avg_sq"}
    optimizer.zero_grad()
    assert layer.magnitude.grad is None


# --- the initialization ------------------------------------------------------------------------


@pytest.fixture
def model(bases):
    return load_model(bases["llama"], dtype=torch.float32, device=CPU)


@pytest.fixture
def probe(rows):
    return collate(load(rows, make_tokenizer(), max_length=256).samples[:4], pad=0)


def start(model, probe, init, *, evidence=None, **more):
    lora = Lora.model_validate({"init": init, "r": 4, "use_dora": True}).resolve()[0]
    targets = find_targets(model, "all-linear")
    return initialize(
        model, targets, lora, seed=0, probe=probe, on_event=lambda event: None, evidence=evidence or {}, **more
    )


def test_report_has_the_size_of_the_magnitudes(model, probe):
    report = start(model, probe, "kaiming")
    for facts in report.modules:
        assert facts["magnitude_norm"] == pytest.approx(
            float(weight_of(model.get_submodule(facts["name"]).base).norm())
        )
    assert [check["passed"] for check in report.summary["checks"]] == [True]
    assert report.summary["max_abs_logit_difference"] == 0.0


def test_expected_first_step_counts_the_magnitudes(model, probe):
    """Near the base model, where the method's gradient was taken, against autograd through the real layers."""
    init = {"method": "lora_one", "gamma": 1e6}
    report = start(model, probe, init, evidence=gradients(model, probe), rate=1e-6, calibration=[probe])
    row_losses(model, probe).mean().backward()
    slopes = dict.fromkeys(("A", "B", "magnitude"), 0.0)
    for layer in adapted_layers(model).values():
        for key, parameter in layer.trained_parameters().items():
            slopes[key] += float(parameter.grad.abs().sum())
    assert slopes["magnitude"] > 0.01 * sum(slopes.values())
    assert report.summary["expected_first_step_change"] == pytest.approx(-1e-6 * sum(slopes.values()), rel=1e-3)


def test_row_of_zeros_is_refused_with_its_module(model, probe):
    """Stock PEFT divides zero by zero there."""
    name = "model.layers.1.mlp.up_proj"
    model.get_submodule(name).weight[3] = 0.0
    with pytest.raises(UnsupportedInit, match=f"{name}: 1 rows") as caught:
        start(model, probe, "kaiming")
    assert caught.value.param == "lora.use_dora"
    module = nn.Linear(IN, OUT).requires_grad_(requires_grad=False)
    module.weight[3] = 0.0
    peft = get_peft_model(nn.ModuleDict({"x": module}), LoraConfig(target_modules=["x"], use_dora=True))
    assert peft.base_model.model["x"](normal(2, IN)).isnan().any()


def test_layers_without_rank_stay_bare(model, probe):
    evidence = {
        name: Evidence(directions=torch.eye(module.weight.shape[1])[:8], spread=torch.ones(8), rank=8 * (number % 2))
        for number, (name, module) in enumerate(find_targets(model, "all-linear").items())
    }
    report = start(model, probe, "eva", evidence=evidence)
    for facts in report.modules:
        layer = adapted_layers(model)[facts["name"]]
        assert (facts["rank"] == 0) == (layer.magnitude is None) == ("magnitude_norm" not in facts)


# --- a whole run -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "optimizer"),
    [
        ("gpt2", "adamw"),
        ("llama", "adamw_preconditioned"),
        *(
            pytest.param(base, optimizer, marks=pytest.mark.slow)
            for base in ("llama", "gpt2")
            for optimizer in OPTIMIZERS
            if (base, optimizer) not in (("gpt2", "adamw"), ("llama", "adamw_preconditioned"))
        ),
    ],
)
def test_run_trains_magnitudes_and_goes_on_from_a_checkpoint_with_the_same_bits(
    request, spec, tmp_path, base, optimizer
):
    # Orthogonal: a factor of zeros could not be preconditioned.
    options = {
        "lora": {"init": "orthogonal", "use_dora": True, "dropout": 0.1},
        "training": {"max_steps": 4, "optimizer": OPTIMIZERS[optimizer], "weight_decay": 0.1},
    }
    if optimizer != "adamw":  # what is trained by others is read in the same way
        request.getfixturevalue("training_only")
    events = []
    done = run(spec(base, **options), tmp_path / "whole", events.append)
    assert (done.export_check["passed"], done.export_check["format"]) == (True, "peft_dora")

    request.getfixturevalue("training_only")
    point = str(tmp_path / "whole/checkpoints/step-000002")
    run(spec(base, **options, resume_from=point), tmp_path / "second", lambda event: None)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    plan = next(e for e in events if isinstance(e, Plan))
    report = next(e.report for e in events if isinstance(e, InitReport))
    assert report["modules"] == plan.modules
    trained = load_file(tmp_path / "whole" / name)
    assert plan.trainable_parameters == sum(tensor.numel() for tensor in trained.values())
    names = {key.rpartition("lora_")[2] for key in trained}
    assert names == {"A.weight", "B.weight", "magnitude_vector"}
    config = json.loads((tmp_path / "whole/adapter/adapter_config.json").read_text())
    assert config["use_dora"] is True
    assert "# DoRA adapter" in (tmp_path / "whole/adapter/README.md").read_text()


def test_trainable_parameters_count_the_magnitudes():
    plain, dora = (Lora(init="kaiming", r=4, use_dora=x) for x in (False, True))
    assert plain.count_parameters(48, 32) == 4 * (48 + 32)
    assert dora.count_parameters(48, 32) == 4 * (48 + 32) + 48


TAKE_DORA = {name for name, kind in INITS.items() if kind.model_validate({"method": name}).offset == "none"} - {"loftq"}
# By hand, so that one of them is missed if it is no longer subtracted.
REFUSE_DORA = {"pissa", "milora", "olora", "loram", "lora_ga", "corda"}


@pytest.mark.parametrize("init", sorted(TAKE_DORA))
def test_starts_without_an_offset_take_dora(init):
    assert Lora.model_validate({"init": init, "use_dora": True}).use_dora


@pytest.mark.parametrize("init", [*sorted(REFUSE_DORA), {"method": "lora_one", "version": "v1"}], ids=str)
def test_subtracted_starts_refuse_dora(init):
    with pytest.raises(ValidationError, match="magnitudes"):
        Lora.model_validate({"init": init, "use_dora": True})
