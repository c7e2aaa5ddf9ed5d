"""What cannot be initialized ends with a code, the module and the reason; nothing is replaced by something else."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from lorainit.config.errors import LorainitError, RankTooLarge, UnknownTarget, UnsupportedInit, UnsupportedModel
from lorainit.model.targets.targets import find_targets
from lorainit.run import run
from tests.lorainit.conftest import chat, make_tokenizer, only_training, tiny_llama, write_rows

UP = "model.layers.1.mlp.up_proj"


def slow(*values):
    """A case of the slow tier."""
    return pytest.param(*values, marks=pytest.mark.slow)


GRADIENT = ["lora_ga", "lora_one"]
DATA = ["lora_ga", "lora_one", "eva", "corda"]


@pytest.fixture
def refused(spec, bases, tmp_path):
    """Run on a base of which one weight was changed; what it was refused with. No adapter may be there.

    `proven`: PEFT is tried before, as in every run. What only the initialization finds needs no trial.
    """

    def start(init, *, change=None, module=UP, sides=(32, 48), proven=False, **overrides) -> LorainitError:
        base = bases["llama"] if change is None else changed(change, module, sides)
        lora = {"init": init} | overrides.pop("lora", {})
        source = {"source": str(base)}
        with nullcontext() if proven else only_training(), pytest.raises(LorainitError) as caught:
            run(spec(model=source, lora=lora, **overrides), tmp_path / "out", lambda event: None)
        assert not (tmp_path / "out" / "adapter").exists()
        return caught.value

    def changed(change, module, sides):
        model = tiny_llama(*sides)
        with torch.no_grad():
            change(model.get_submodule(module).weight)
        model.save_pretrained(tmp_path / "base")
        make_tokenizer().save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return start


@pytest.mark.parametrize(
    ("module", "value", "quantization"),
    [
        (UP, math.inf, "nf4"),
        ("model.embed_tokens", math.inf, None),
        ("model.norm", math.nan, None),
        *(
            slow(*case)
            for case in [
                (UP, math.nan, None),
                (UP, math.inf, None),
                (UP, math.nan, "nf4"),
                ("model.embed_tokens", math.nan, None),
                ("model.embed_tokens", math.nan, "nf4"),
                ("model.embed_tokens", math.inf, "nf4"),
                ("model.norm", math.inf, None),
                ("model.norm", math.inf, "nf4"),
                ("model.norm", math.nan, "nf4"),
            ]
        ),
    ],
)
def test_weight_that_is_not_finite(refused, module, value, quantization):
    def change(weight):
        weight.view(-1)[0] = value

    error = refused("loram", change=change, module=module, sides=(64, 128), lora={"quantization": quantization})
    assert isinstance(error, UnsupportedModel)
    assert error.message == f"{module}.weight: the base weight has non-finite entries."
    assert error.param == "model"


@pytest.mark.parametrize("init", ["kaiming", slow("lora_one"), slow("eva")])
def test_base_that_overflows_on_the_rows(refused, init):
    """The trial with PEFT finds it, before the initialization has looked at anything."""
    lora = {"target_modules": ["down_proj"]}
    error = refused(init, change=lambda weight: weight.fill_(3e38), lora=lora, proven=True)
    assert isinstance(error, UnsupportedModel)
    assert "the first training rows are not finite" in error.message
    assert error.param == "model"


@pytest.mark.parametrize("init", GRADIENT)
def test_gradient_that_is_zero(refused, init):
    error = refused(init, change=torch.Tensor.zero_, module="model.layers.1.mlp.down_proj")
    assert isinstance(error, UnsupportedInit)
    assert f"The gradient is zero in model.layers.1.mlp.gate_proj, {UP}:" in error.message


@pytest.mark.parametrize(
    ("init", "change", "code", "text"),
    [
        ("loram", torch.Tensor.zero_, "unsupported_init_for_model", "zero"),
        ("loram", lambda w: w.fill_(0.1), "unsupported_init_for_model", "all entries"),
        ("milora", lambda w: w[:, 3:].zero_(), "unsupported_init_for_model", "fewer than 4 singular values"),
        ({"method": "corda", "mode": "kpm"}, lambda w: w[:, 3:].zero_(), "init_failed", "fewer than 4 singular values"),
    ],
    ids=["zero", "constant", "rank deficient", "rank deficient under its inputs"],
)
def test_weight_without_the_directions_a_method_takes(refused, init, change, code, text):
    error = refused(init, change=change)
    assert (error.code, error.message.startswith(f"{UP}: ")) == (code, True)
    assert text in error.message


@pytest.mark.parametrize("init", ["kaiming", slow("lora_one"), slow("eva"), "hrp"])
def test_rank_above_the_smaller_side(refused, init):
    error = refused(init, lora={"r": 17, "target_modules": ["q_proj", "k_proj"]})
    assert isinstance(error, RankTooLarge)
    assert "the smaller side (16) of 'k_proj' (16x32)" in error.message
    assert (error.code, error.param) == ("rank_too_large", "lora.r")


@pytest.mark.parametrize("init", ["lora_ga", {"method": "hrp", "preheat_rank": 17}])
def test_method_that_needs_more_directions_than_the_rank(refused, init):
    error = refused(init, lora={"r": 12, "target_modules": ["k_proj"]})
    assert isinstance(error, RankTooLarge)
    assert "directions, more than the smaller side (16) of 'k_proj' (16x32)" in error.message
    assert error.param == "lora.init"


@pytest.mark.parametrize("init", ["eva", *(slow(name) for name in DATA if name != "eva")])
def test_calibration_file_without_a_usable_row(refused, tmp_path, init):
    rows = write_rows(tmp_path / "calibration.jsonl", ["not a row"])
    error = refused(init, data={"calibration": str(rows)})
    assert error.param == "data.calibration"


def test_fewer_tokens_than_eva_needs(refused, tmp_path):
    rows = write_rows(tmp_path / "calibration.jsonl", [chat("What?", "it")])
    error = refused("eva", data={"calibration": str(rows)})
    assert isinstance(error, UnsupportedInit)
    assert "model.layers.0.self_attn.q_proj" in error.message
    assert "needs more tokens" in error.message
    assert error.param == "lora.init.samples"


@pytest.mark.parametrize(
    ("name", "made"),
    [("patch", nn.Conv2d(3, 4, 2)), ("table", nn.Embedding(4, 5)), ("bank", nn.Conv1d(3, 4, 2))],
)
def test_targets_that_are_not_linear_layers(name, made):
    model = tiny_llama()
    model.model.add_module(name, made)
    with pytest.raises(UnknownTarget, match=rf"{name} is of type {type(made).__name__}; only linear layers") as caught:
        find_targets(model, ["q_proj", name])
    assert caught.value.param == "lora.target_modules[1]"
    assert not any(name in found for found in find_targets(model, "all-linear"))
