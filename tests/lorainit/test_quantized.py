"""NF4 bases: bit for bit what anybody loads, read back as they are used, and never changed.

What every method must do on one is in the battery; here is the base itself, the gradient through it and
whole runs.
"""

import copy
import hashlib
import importlib.util
import json
import subprocess
import sys
from functools import cache

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lorainit.config.errors import InitFailed, UnsupportedModel
from lorainit.config.events import Done, InitReport, Metrics
from lorainit.config.spec import Lora
from lorainit.data.batches import Budget, collate
from lorainit.data.reader import load
from lorainit.export.check import check, make_prompts
from lorainit.export.effect import observe
from lorainit.export.peft_adapter import export
from lorainit.init.collectors.gradients import compute_mean_gradients
from lorainit.init.initialize import initialize
from lorainit.model import load as load_module
from lorainit.model.forward.loss import logits_of
from lorainit.model.layers import quantize
from lorainit.model.layers.layer import adapted_layers, attach, detach
from lorainit.model.layers.weight import shape_of, was_conv1d, weight_of
from lorainit.model.load import load_model
from lorainit.model.targets import peft_support
from lorainit.model.targets.four_bits import FourBits
from lorainit.model.targets.targets import find_linear_layers, find_targets
from lorainit.run import run
from lorainit.runtime import devices
from tests.lorainit.conftest import make_tokenizer, only_training
from tests.zoo.bases import make

pytestmark = pytest.mark.usefixtures("training_only")

CPU = torch.device("cpu")
BASES = ["wide-llama", "wide-gpt2"]


def slow(*values):
    """A case of the slow tier."""
    return pytest.param(*values, marks=pytest.mark.slow)


def nf4(folder, dtype=torch.float32):
    return load_model(folder, dtype=dtype, device=CPU, quantization="nf4")


def bits(model):
    """Every tensor of the model's state: the packed weights, their scales and whatever was not quantized."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    """The folder of a base of the zoo, which is made once."""
    return cache(lambda kind: make(kind, tmp_path_factory.mktemp("bases") / kind))


@pytest.fixture(scope="module")
def samples(rows):
    return load(rows, make_tokenizer(), max_length=256).samples


# --- the base ------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_base_is_the_one_that_anybody_loads_in_nf4(bases, base, dtype):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    stock = AutoModelForCausalLM.from_pretrained(bases[base], dtype=dtype, quantization_config=config)
    assert bits(nf4(bases[base], dtype)) == bits(stock)


@pytest.mark.parametrize("base", BASES)
def test_every_linear_layer_but_the_output_head_is_quantized_with_its_shape(bases, base):
    full = find_linear_layers(load_model(bases[base], dtype=torch.float32, device=CPU))
    model = nf4(bases[base])
    layers = find_linear_layers(model)
    assert layers.keys() == full.keys()
    assert all(quantize.is_quantized(m) and shape_of(m) == shape_of(full[n]) for n, m in layers.items())
    assert not quantize.is_quantized(model.get_output_embeddings())
    assert {was_conv1d(m) for m in layers.values()} == {base == "wide-gpt2"}


@pytest.mark.parametrize("base", BASES)
def test_the_weight_read_back_is_the_rounded_original(bases, base):
    full = find_linear_layers(load_model(bases[base], dtype=torch.float32, device=CPU))
    for name, layer in find_linear_layers(nf4(bases[base])).items():
        W, Q, state = weight_of(full[name]), weight_of(layer), layer.weight.quant_state
        packed = layer.weight.data.flatten()
        codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
        assert torch.equal(Q, (state.code[codes].reshape(-1, 64) * state.absmax[:, None]).reshape(W.shape))
        assert 0.08 < float((W - Q).norm() / W.norm()) < 0.11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_running_the_model_leaves_its_weights_as_they_are(bases, samples, dtype):
    """On some CPUs bitsandbytes would repack and round them at the first forward pass."""
    model = nf4(bases["wide-llama"], dtype)
    before = bits(model)
    with torch.no_grad():
        logits_of(model, collate(samples[:2], pad=0))
    assert bits(model) == before
    layer = find_targets(model, ["q_proj"])["model.layers.0.self_attn.q_proj"]
    used = layer(torch.eye(64, dtype=dtype))
    assert torch.equal(used.T, weight_of(layer))


def test_a_weight_that_is_not_what_the_forward_pass_uses_is_refused(bases, monkeypatch):
    monkeypatch.setattr(quantize, "dequantize", lambda module: torch.randn(shape_of(module)))
    with pytest.raises(InitFailed, match="q_proj: the dequantized weight is not the one"):
        nf4(bases["wide-llama"])


def test_rows_that_are_not_whole_blocks_are_refused(bases):
    with pytest.raises(UnsupportedModel, match=r"q_proj has 32 inputs.*64") as caught:
        nf4(bases["llama"])
    assert caught.value.param == "lora.quantization"


def test_the_layers_that_carry_a_lora_are_those_of_the_base_in_full_precision(base_of):
    """Jamba reads a weight past its layer, and only its bias when it is quantized."""
    folder = base_of("jamba")
    found = []
    for quantization in ("nf4", None):
        peft_support._refusals.cache_clear()
        model = load_model(folder, dtype=torch.float32, device=CPU, quantization=quantization)
        found.append(list(find_targets(model, "all-linear")))
    assert found[0] == found[1]


def test_bitsandbytes_misreads_such_rows_on_a_cpu():
    """Why they are refused. If this fails, bitsandbytes has mended it and the refusal can go."""
    W = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    errors = {}
    for n in (64, 96):
        part = W[:, :n].contiguous()
        errors[n] = float(
            (dequantize_4bit(*quantize_4bit(part, quant_type="nf4", blocksize=64)) - part).norm() / part.norm()
        )
    assert errors[64] < 0.1
    assert errors[96] > 0.2


def test_without_the_library_the_refusal_names_the_extra(spec, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest)
    )
    with pytest.raises(UnsupportedModel, match=r"lorainit\[quantized\]") as caught:
        run(spec("wide-llama", lora={"quantization": "nf4"}), tmp_path, lambda event: None)
    assert caught.value.param == "lora.quantization"


def test_the_record_has_the_librarys_version():
    assert devices.package_versions()["bitsandbytes"] == bitsandbytes.__version__


@pytest.mark.parametrize(
    ("lora", "code", "param", "text"),
    [
        ({"quantization": "int8"}, "not_supported", "quantization", "planned"),
        ({"init": "loftq"}, "unsupported_combination", "quantization", "loftq needs quantization 'nf4'"),
        ({"use_dora": True, "quantization": "nf4"}, "unsupported_combination", "use_dora", "use_dora"),
        ({"init": {"method": "loftq", "bits": 8}, "quantization": "nf4"}, "not_supported", "bits", "planned"),
        (
            {"init": {"method": "loftq", "iterations": 2}, "quantization": "nf4"},
            "unsupported_combination", "iterations", "no longer the untouched model in NF4",
        ),
    ],
)  # fmt: skip
def test_what_does_not_combine_is_refused(lora, code, param, text):
    with pytest.raises(ValidationError) as caught:
        Lora.model_validate(lora)
    (fault,) = caught.value.errors()
    assert (fault["type"], fault["ctx"]["param"]) == (code, param)
    assert text in fault["msg"]


# --- the gradient through it ---------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
def test_the_gradient_is_that_of_the_dequantized_model(bases, samples, base):
    """Against autograd's own weight gradient in a copy whose linear layers hold the rounded weights in full."""
    model = nf4(bases[base])
    copied = copy.deepcopy(model)
    weights = {}
    for name, layer in find_linear_layers(copied).items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        linear.weight = nn.Parameter(weight_of(layer))
        if layer.bias is not None:
            linear.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
        attach(copied, name, linear)
        weights[name] = linear.weight
    for sample in samples[:4]:
        batch = collate([sample], pad=0)
        logits = copied(input_ids=batch.ids).logits[0, :-1]
        wanted = sample.trained[1:]
        nn.functional.cross_entropy(logits[wanted], sample.ids[1:].long()[wanted]).backward()
    targets = find_targets(model, "all-linear")
    before = bits(model)
    found = compute_mean_gradients(
        model, targets, samples[:4], pad=0, device=CPU, budget=Budget(2), on_tick=lambda done, total: None
    )
    assert found.keys() == weights.keys()
    for name, G in found.items():
        wanted = weights[name].grad / 4
        assert float((G - wanted).norm() / wanted.norm()) < 1e-5, name
    assert bits(model) == before


# --- whole runs ----------------------------------------------------------------------------------


def go(spec, out):
    events = []
    run(spec, out, events.append)
    return events


@pytest.mark.parametrize(
    ("init", "base"),
    [
        ("lora_one", "wide-llama"),
        ("loftq", "wide-gpt2"),
        *(slow(init, "wide-llama") for init in ("kaiming", "pissa", "loftq")),
        *(slow(init, "wide-gpt2") for init in ("kaiming", "pissa", "lora_one")),
    ],
)
def test_a_run_trains_exports_and_says_on_which_base(spec, rows, tmp_path, base, init):
    training = {"max_steps": 12, "learning_rate": 5e-3, "eval_interval": 12, "checkpoint_interval": 12}
    lora = {"init": init, "quantization": "nf4", "alpha": 8.0, "use_rslora": False}
    events = go(spec(base, lora=lora, training=training, data={"validation": str(rows)}), tmp_path)
    done = events[-1]
    assert isinstance(done, Done)
    assert done.export_check["passed"] is True
    losses = [e.full_valid_loss for e in events if isinstance(e, Metrics) and e.full_valid_loss is not None]
    assert losses[-1] < 0.9 * losses[0]
    manifest = json.loads((tmp_path / "adapter/manifest.json").read_text())
    assert manifest["lora"]["quantization"] == "nf4"
    card = (tmp_path / "adapter/README.md").read_text()
    assert "loaded in NF4" in card
    assert 'bnb_4bit_quant_type="nf4"' in card
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == (base == "wide-gpt2")


@pytest.mark.parametrize("base", BASES)
def test_the_adapter_loads_on_the_full_precision_base_which_is_another_model(bases, samples, tmp_path, base):
    model = nf4(bases[base])
    lora = Lora.model_validate({"init": "pissa", "r": 4, "quantization": "nf4"}).resolve()[0]
    targets = find_targets(model, "all-linear")
    initialize(model, targets, lora, seed=0, probe=collate(samples[:2], pad=0), on_event=lambda event: None)
    export(model, adapted_layers(model), tmp_path, root="tests/base")
    texts = make_prompts(samples)
    effect = observe(model, detach(model), texts, divided=False, on_event=lambda event: None)

    def checked(quantization):
        fresh = load_model(bases[base], dtype=torch.float32, device=CPU, quantization=quantization)
        return check(fresh, tmp_path, effect, source_rank=4, base_sha256="x", on_event=lambda event: None)[0]

    assert checked("nf4")["passed"] is True
    full = checked(None)
    assert [loader["loaded"] for loader in full["loaders"]] == [True]
    assert full["message"].startswith(f"{next(iter(targets))}: the base model's own layer differs by")
    assert full["max_abs_logit_difference"] > 100 * full["tolerance"]


def test_a_resumed_run_ends_with_the_same_bits(spec, tmp_path):
    lora = {"init": "loftq", "quantization": "nf4"}
    whole, second = tmp_path / "whole", tmp_path / "second"
    go(spec("wide-llama", lora=lora), whole)
    go(spec("wide-llama", lora=lora, resume_from=str(whole / "checkpoints/step-000002")), second)
    name = "adapter/adapter_model.safetensors"
    assert (second / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_two_processes_train_what_one_trains(spec, tmp_path):
    """Each of them quantizes the base, and starts from the same factors."""
    one = spec("wide-llama", lora={"init": "loftq", "quantization": "nf4"}, micro_batch_size=2)
    go(one, tmp_path / "alone")
    file = tmp_path / "spec.json"
    file.write_text(one.model_copy(update={"devices": 2}).model_dump_json())
    command = [sys.executable, "-m", "lorainit", str(file), str(tmp_path / "shared")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(tmp_path / who / "adapter/adapter_model.safetensors") for who in ("shared", "alone"))
    assert all(torch.allclose(tensor, theirs[name], rtol=1e-4, atol=2e-6) for name, tensor in ours.items())


@pytest.fixture(scope="module")
def with_a_cache(spec, tmp_path_factory):
    """A run on the base in full precision, then two on it in NF4: the folder, and whether each began with the cache.

    The same weights, targets and rows: only the base's form differs.
    """
    folder = tmp_path_factory.mktemp("cache")

    def cached(quantization, out):
        lora = {"init": {"method": "lora_one", "samples": 4}, "quantization": quantization}
        one = spec("wide-llama", lora=lora, cache=str(folder / "cache"), training={"max_steps": 1})
        (report,) = [e.report for e in go(one, folder / out) if isinstance(e, InitReport)]
        return report["cached"]

    with only_training():
        return folder, [cached(None, "full"), cached("nf4", "first"), cached("nf4", "second")]


def test_the_cache_does_not_mix_bases(with_a_cache):
    _, cached = with_a_cache
    assert cached == [False, False, True]


def test_the_adapter_of_a_full_precision_base_does_not_speak_of_nf4(with_a_cache):
    folder, _ = with_a_cache
    assert "NF4" not in (folder / "full/adapter/README.md").read_text()


def test_a_base_that_does_not_run_in_four_bits_is_refused(spec, base_of, tmp_path, monkeypatch):
    """As Mamba does not, whose kernels read weights past their layers, if all of them were in four bits."""
    monkeypatch.setattr(load_module, "choose_four_bits", lambda model: FourBits([], None))
    source = {"source": str(base_of("mamba"))}
    with pytest.raises(UnsupportedModel, match="does not run with its layers in nf4"):
        run(spec(model=source, lora={"init": "kaiming", "quantization": "nf4"}), tmp_path / "out", lambda event: None)
