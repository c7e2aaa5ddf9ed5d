"""What every method must do on every kind of layer and at every scale: a new method inherits it all.

Each case is initialized, trained for a few steps and exported once; the tests look at what is left.
"""

import hashlib
import json
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorainit.config.inits import INITS
from lorainit.config.spec import Hyperparameters, Lora
from lorainit.data.batches import collate
from lorainit.data.reader import load
from lorainit.export.peft_adapter import export
from lorainit.init.collectors.collect import collect
from lorainit.init.initialize import initialize
from lorainit.model.forward.loss import logits_of, sum_losses
from lorainit.model.layers.layer import adapted_layers, attach, detach, disable_adapters
from lorainit.model.load import load_model
from lorainit.model.targets.targets import find_targets
from lorainit.train.loop import train
from tests.lorainit.conftest import make_tokenizer
from tests.lorainit.contexts import run_of
from tests.lorainit.init.methods.test_methods import factors, weight

CPU = torch.device("cpu")
SCALINGS = {"alpha=r": {"alpha": 4.0}, "alpha=2r": {"alpha": 8.0}, "rslora": {"alpha": 4.0, "use_rslora": True}}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Each kind of base: its folder's name and `lora.quantization`.
BASES = {
    "llama": ("llama", None),
    "gpt2": ("gpt2", None),
    "llama-nf4": ("wide-llama", "nf4"),
    "gpt2-nf4": ("wide-gpt2", "nf4"),
}
# Every method, and DoRA from every start that is not subtracted, on a base that is not quantized.
DORA = "+dora"
EVERY = [
    (base, method + flag, scaling, dtype)
    for base, (_, quantization) in BASES.items()
    for method, kind in INITS.items()
    if quantization in kind.facts.quantization
    for flag in ("", DORA)
    if not flag or (quantization is None and kind.model_validate({"method": method}).offset == "none")
    for scaling in (SCALINGS if quantization is None else ["alpha=2r"])
    for dtype in DTYPES
]
STARTS = list(dict.fromkeys(start for _, start, _, _ in EVERY))


def is_usual(case):
    """Each start on each kind of base once in float32, and once more on one of two like bases.

    So each start and each base meet every scaling and dtype, and each other. The other products are slow.
    """
    base, start, *kind = case
    turn = (list(BASES).index(base) + STARTS.index(start)) % 2
    if BASES[base][1]:
        return kind[1] == "fp32" or turn == 0
    return kind in (["alpha=r", "fp32"], ["rslora", "fp32"] if turn else ["alpha=2r", "bf16"])


NAMED = [case for case in EVERY if is_usual(case)]
CASES = [case if case in NAMED else pytest.param(case, marks=pytest.mark.slow) for case in EVERY]
# Differences that are rounding, relative to the largest logit; a bf16 logit has 8 bits.
EXACT = {"fp32": 1e-5, "bf16": 2**-5}
# Real evidence, of a few rows and steps.
SMALL = {
    "lora_ga": {"samples": 4},
    "lora_one": {"samples": 4},
    "eva": {"samples": 4},
    "corda": {"samples": 4},
    "hrp": {"preheat_rank": 8, "preheat_steps": 4},
}


@dataclass
class Case:
    lora: Lora
    base_logits: torch.Tensor
    start_logits: torch.Tensor
    start_disabled: torch.Tensor
    trained_logits: torch.Tensor
    trained_disabled: torch.Tensor
    gradients: dict[str, float]
    hashes: tuple[str, str]
    adapter: Path
    report: dict
    exact: float


def tensors_hash(model):
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if name.rpartition(".")[2] not in ("A", "B", "A0", "B0", "magnitude"):
            digest.update(name.replace(".base.", ".").encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def evidence_for(model, targets, lora, data, folder):
    recipe = Hyperparameters(learning_rate=1e-2, batch_size=4, n_epochs=1)
    run = run_of(model, targets, data, lora, training=recipe, size=4, seed=7, folder=folder)
    return collect(lora.method, run)


def run_case(folder, data, out, start, scaling, *, dtype="fp32", steps=2, quantization=None):
    method = start.removesuffix(DORA)
    model = load_model(folder, dtype=DTYPES[dtype], device=CPU, quantization=quantization)
    batch = collate(data.samples[:4], pad=0)
    with torch.no_grad():
        base_logits, before = logits_of(model, batch), tensors_hash(model)
    init = {"method": method, **SMALL.get(method, {})}
    lora = Lora.model_validate(
        {
            "init": init,
            "r": 4,
            "use_dora": start.endswith(DORA),
            "quantization": quantization,
            **SCALINGS[scaling],
        }
    ).resolve()[0]
    targets = find_targets(model, "all-linear")
    evidence = evidence_for(model, targets, lora, data, folder)
    report = initialize(
        model, targets, lora, seed=7, probe=batch, evidence=evidence, calibration=[batch], on_event=lambda event: None
    )

    def both():
        with torch.no_grad():
            enabled = logits_of(model, batch)
            with disable_adapters(model):
                return enabled, logits_of(model, batch)

    start, start_disabled = both()
    sum_losses(model, batch).loss.backward()
    layers = adapted_layers(model).values()
    gradients = {
        key: sum(
            float(layer.trained_parameters()[key].grad.abs().sum())
            for layer in layers
            if key in layer.trained_parameters()
        )
        for key in ("A", "B", "magnitude")
    }
    model.zero_grad()
    hyper = {"max_steps": steps, "batch_size": 4, "learning_rate": 1e-2, "warmup_ratio": 0.0, "n_epochs": 1}
    recipe = Hyperparameters(**hyper, eval_interval=9, checkpoint_interval=9)
    job = run_of(model, {}, data, lora, training=recipe, size=4, seed=7, out=out, layers=detach(model))
    ([(_, end)],) = train([job], [None], write_adapter=lambda run, path: None)
    assert end.step == steps
    for name, layer in job.layers.items():
        attach(model, name, layer)
    trained, trained_disabled = both()
    export(model, adapted_layers(model), out / "adapter", root="tests/base")
    return Case(
        lora, base_logits, start, start_disabled, trained, trained_disabled, gradients,
        (before, tensors_hash(model)), out / "adapter", report.summary,
        EXACT[dtype] * max(1.0, float(base_logits.abs().max())),
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(rows):
    return load(rows, make_tokenizer(), max_length=256)


@pytest.fixture(scope="module")
def cases(request, bases, data, tmp_path_factory):
    """All cases that are asked for, each run once; those that a test asks for besides are run when it does."""

    class Cases(dict):
        def __missing__(self, key):
            base, method, scaling, dtype = key
            folder, quantization = BASES[base]
            out = tmp_path_factory.mktemp("case")
            made = run_case(bases[folder], data, out, method, scaling, dtype=dtype, quantization=quantization)
            return self.setdefault(key, made)

    made = Cases()
    for key in asked_for(request.session.items):
        made[key]
    return made


def asked_for(items):
    """The cases of these tests of this module."""
    params = [item.callspec.params for item in items if item.path == Path(__file__) and hasattr(item, "callspec")]
    return [param.get("case") or param["key"] for param in params if param.keys() & {"case", "key"}]


@pytest.fixture(params=CASES, ids="-".join)
def case(request, cases):
    return cases[request.param]


def largest(a, b):
    return float((a.float() - b.float()).abs().max())


def test_training_starts_where_the_method_says(case):
    moved = largest(case.start_logits, case.base_logits)
    if case.lora.method.function_preserving:
        assert moved <= case.exact
        assert [c["passed"] for c in case.report["checks"]] == [True]
    else:
        assert moved > case.exact
        assert case.report["checks"] == []
    if case.lora.method.method == "lora_one":
        loss = case.report["calibration_loss"]
        assert loss["after"] < loss["before"]
        assert case.report["expected_displacement_change"] < 0


def test_disabled_adapter_is_the_base_model_bit_for_bit(case):
    assert torch.equal(case.start_disabled, case.base_logits)
    assert torch.equal(case.trained_disabled, case.base_logits)


def test_base_tensors_are_untouched_by_initialization_and_training(case):
    assert case.hashes[0] == case.hashes[1]


def test_training_moves_the_model(case):
    assert largest(case.trained_logits, case.base_logits) > 1e-3
    assert not torch.equal(case.trained_logits, case.start_logits)


def test_first_gradient_reaches_both_factors_unless_b_is_zero(case):
    assert case.gradients["B"] > 0
    assert (case.gradients["magnitude"] > 0) == case.lora.use_dora
    of_one_layer = factors(case.lora.method.method, weight())  # by the method alone, without the engine
    assert (case.gradients["A"] == 0) == (not of_one_layer.B.any())


def test_export_has_the_stated_rank_and_the_same_scale(case):
    config = json.loads((case.adapter / "adapter_config.json").read_text())
    tensors = load_file(case.adapter / "adapter_model.safetensors")
    magnitudes = [n for n in tensors if n.endswith("lora_magnitude_vector")]
    assert len(magnitudes) == (case.lora.use_dora and len(tensors) // 3)
    assert config["use_dora"] == case.lora.use_dora
    factor = 2 if case.lora.method.offset == "subtract" else 1
    ranks = [t.shape[0] for n, t in tensors.items() if "lora_A" in n]
    assert set(ranks) == {config["r"]} == {factor * case.report["ranks"]["max"]}
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["use_rslora"] is False
    assert config["lora_alpha"] / config["r"] == pytest.approx(case.lora.scaling)


RELOAD = """
import copy, json, sys, warnings
import torch
warnings.simplefilter("ignore")
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
torch.manual_seed(12345)
def load_base(base, quantized, dtype):
    options = {}
    if quantized:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        options = {"quantization_config": config}
    base = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **options)
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # or bitsandbytes rounds to bf16, and asks for 32 outputs
    return base
bases, found = {}, {}
for name, (base, quantized, adapter, batch, expected, dtype, low) in json.loads(sys.stdin.read()).items():
    key = base, quantized, getattr(torch, dtype)
    if key not in bases:
        bases[key] = load_base(*key)
    base = copy.deepcopy(bases[key])
    model = PeftModel.from_pretrained(base, adapter, low_cpu_mem_usage=low).eval()
    batch, expected = load_file(batch), load_file(expected)["logits"]
    with torch.no_grad():
        on = model(**batch).logits
        with model.disable_adapter():
            off = model(**batch).logits
        base_again = model.unload()(**batch).logits
    found[name] = [float((on.float() - expected.float()).abs().max()), float((off - base_again).abs().max())]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def reloaded(cases, bases, data, tmp_path_factory):
    """Logit differences of every exported adapter, loaded by stock PEFT in one new process."""
    folder = tmp_path_factory.mktemp("reload")
    batch = collate(data.samples[:4], pad=0)
    save_file({"input_ids": batch.ids, "attention_mask": batch.attention}, folder / "batch")
    jobs = {}
    for number, (key, case) in enumerate(cases.items()):
        save_file({"logits": case.trained_logits.contiguous()}, folder / str(number))
        base, quantization = BASES[key[0]]
        paths = [case.adapter, folder / "batch", folder / str(number)]
        dtype = str(DTYPES[key[3]]).removeprefix("torch.")
        jobs["-".join(key)] = [str(bases[base]), bool(quantization), *map(str, paths), dtype, number // 2 % 2 == 0]
    done = subprocess.run(
        [sys.executable, "-c", RELOAD], input=json.dumps(jobs), capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("key", CASES, ids="-".join)
def test_export_is_the_trained_model_for_stock_peft_in_a_new_process(reloaded, cases, key):
    on, off = reloaded["-".join(key)]
    assert on <= EXACT[key[3]] * max(1.0, float(cases[key].trained_logits.abs().max()))
    assert off == 0.0


@pytest.mark.parametrize("names", [("pissa", "loram"), ("lora_ga", "lora_one"), ("olora", "kaiming")])
def test_two_adapters_side_by_side_are_each_exact(cases, bases, data, names):
    """What raw base-changing adapters cannot do: switching, mixed batches, deletion, and the base in between."""
    wanted = [cases["llama", name, "alpha=r", "fp32"] for name in names]
    batch = collate(data.samples[:4], pad=0)
    base = AutoModelForCausalLM.from_pretrained(bases["llama"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(base, wanted[0].adapter, adapter_name="0").eval()
        model.load_adapter(wanted[1].adapter, adapter_name="1")

    def logits(**more):
        with torch.no_grad():
            return model(input_ids=batch.ids, attention_mask=batch.attention, **more).logits

    for turn in (1, 0, 1):
        model.set_adapter(str(turn))
        assert largest(logits(), wanted[turn].trained_logits) <= wanted[turn].exact
        with model.disable_adapter():
            assert torch.equal(logits(), wanted[turn].base_logits)
    mixed = logits(adapter_names=["0", "1", "__base__", "0"])
    for row, case_ in enumerate((wanted[0], wanted[1], None, wanted[0])):
        expected = case_.trained_logits if case_ else wanted[0].base_logits
        assert largest(mixed[row], expected[row]) <= wanted[0].exact
    model.set_adapter("0")
    model.delete_adapter("1")
    assert largest(logits(), wanted[0].trained_logits) <= wanted[0].exact


def test_adapters_are_float32_whatever_the_base(cases):
    assert cases["llama", "loram", "alpha=r", "fp32"]  # one at least, also when this test runs alone
    for case in cases.values():
        tensors = load_file(case.adapter / "adapter_model.safetensors")
        assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_conv1d_factors_have_the_orientation_of_the_map(cases):
    case = cases["gpt2", "loram", "alpha=r", "fp32"]
    tensors = load_file(case.adapter / "adapter_model.safetensors")
    name = "base_model.model.transformer.h.0.mlp.c_fc.lora_{}.weight"
    assert tensors[name.format("A")].shape == (8, 32)
    assert tensors[name.format("B")].shape == (128, 8)
