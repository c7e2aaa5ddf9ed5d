"""What every method must do on every kind of layer and at every scale: a new method inherits it all.

Each case is initialized, trained for a few steps and exported once; the tests look at what is left.
"""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorainit.adapter import check, export, prompts, record, require
from lorainit.data import collate, load
from lorainit.errors import ExportCheckFailed
from lorainit.initialize import initialize
from lorainit.layer import adapted, disabled, weight_of
from lorainit.loss import logits_of, tally
from lorainit.model import find_targets, load_model
from lorainit.spec import INITS, Hyperparameters, Lora
from lorainit.train import train
from tests.lorainit.conftest import make_tokenizer

CPU = torch.device("cpu")
SCALINGS = {"alpha=r": {"alpha": 4.0}, "alpha=2r": {"alpha": 8.0}, "rslora": {"alpha": 4.0, "use_rslora": True}}
CASES = [(base, method, scaling) for base in ("llama", "gpt2") for method in INITS for scaling in SCALINGS]


@dataclass
class Case:
    lora: Lora
    base_logits: torch.Tensor
    start_logits: torch.Tensor
    start_disabled: torch.Tensor
    trained_logits: torch.Tensor
    trained_disabled: torch.Tensor
    gradients: tuple[float, float]
    hashes: tuple[str, str]
    adapter: Path
    report: dict


def tensors_hash(model):
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if name.rpartition(".")[2] not in ("A", "B", "A0", "B0"):
            digest.update(name.replace(".base.", ".").encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def run_case(folder, data, out, method, scaling, *, dtype=torch.float32, steps=3):
    model = load_model(folder, dtype=dtype, device=CPU)
    batch = collate(data.samples[:4], pad=0)
    with torch.no_grad():
        base_logits, before = logits_of(model, batch), tensors_hash(model)
    lora = Lora.model_validate({"init": method, "r": 4, **SCALINGS[scaling]}).resolved()[0]
    targets = find_targets(model, "all-linear")
    report = initialize(model, targets, lora, seed=7, probe=batch, on_event=lambda event: None)

    def both():
        with torch.no_grad():
            enabled = logits_of(model, batch)
            with disabled(model):
                return enabled, logits_of(model, batch)

    start, start_disabled = both()
    tally(model, batch).loss.backward()
    layers = adapted(model).values()
    gradients = tuple(sum(float(getattr(m, k).grad.abs().sum()) for m in layers) for k in ("A", "B"))
    model.zero_grad()
    hyper = {"max_steps": steps, "batch_size": 4, "learning_rate": 1e-2, "warmup_ratio": 0.0, "n_epochs": 1}
    recipe = Hyperparameters(**hyper, eval_interval=9, checkpoint_interval=9)
    train(
        model, data, None, recipe, out=out, seed=7, micro_batch_size=4, pad=0, checkpoint_recipe={},
        write_adapter=lambda path: None, on_event=lambda event: None,
    )  # fmt: skip
    trained, trained_disabled = both()
    export(model, out / "adapter", root="tests/base", rslora=lora.use_rslora)
    return Case(
        lora, base_logits, start, start_disabled, trained, trained_disabled, gradients,
        (before, tensors_hash(model)), out / "adapter", report.summary,
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(rows):
    return load(rows, make_tokenizer(), max_length=256)


@pytest.fixture(scope="module")
def cases(bases, data, tmp_path_factory):
    """All cases, run once."""
    made = {}
    for base, method, scaling in CASES:
        out = tmp_path_factory.mktemp("case")
        made[base, method, scaling] = run_case(bases[base], data, out, method, scaling)
    return made


@pytest.fixture(params=CASES, ids="-".join)
def case(request, cases):
    return cases[request.param]


def largest(a, b):
    return float((a.float() - b.float()).abs().max())


def test_training_starts_as_the_base_model(case):
    assert largest(case.start_logits, case.base_logits) <= 1e-5 * max(1.0, float(case.base_logits.abs().max()))
    assert all(c["passed"] for c in case.report["checks"])


def test_disabled_adapter_is_the_base_model_bit_for_bit(case):
    assert torch.equal(case.start_disabled, case.base_logits)
    assert torch.equal(case.trained_disabled, case.base_logits)


def test_base_tensors_are_untouched_by_initialization_and_training(case):
    assert case.hashes[0] == case.hashes[1]


def test_training_moves_the_model(case):
    assert largest(case.trained_logits, case.base_logits) > 1e-3


def test_first_gradient_reaches_both_factors_unless_b_is_zero(case):
    A, B = case.gradients
    assert B > 0
    assert (A == 0) == (case.lora.method.method in ("kaiming", "gaussian"))


def test_export_has_the_stated_rank_and_the_same_scale(case):
    config = json.loads((case.adapter / "adapter_config.json").read_text())
    rank = 8 if case.lora.method.facts.offset == "subtract" else 4
    assert config["r"] == rank
    divisor = rank**0.5 if config["use_rslora"] else rank
    assert config["lora_alpha"] / divisor == pytest.approx(case.lora.scaling)


RELOAD = """
import json, sys, warnings
import torch
warnings.simplefilter("ignore")
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
torch.manual_seed(12345)
found = {}
for name, (base, adapter, batch, expected, low) in json.loads(sys.stdin.read()).items():
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter, low_cpu_mem_usage=low
    ).eval()
    batch, expected = load_file(batch), load_file(expected)["logits"]
    with torch.no_grad():
        on = model(**batch).logits
        with model.disable_adapter():
            off = model(**batch).logits
        base_again = model.unload()(**batch).logits
    found[name] = [float((on - expected).abs().max()), float((off - base_again).abs().max())]
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
        paths = [bases[key[0]], case.adapter, folder / "batch", folder / str(number)]
        jobs["-".join(key)] = [*map(str, paths), number % 2 == 0]
    done = subprocess.run(
        [sys.executable, "-c", RELOAD], input=json.dumps(jobs), capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["-".join(case) for case in CASES])
def test_export_is_the_trained_model_for_stock_peft_in_a_new_process(reloaded, name):
    on, off = reloaded[name]
    assert on <= 1e-5
    assert off == 0.0


# --- number formats and the check itself --------------------------------------------------------


@pytest.mark.parametrize("method", ["kaiming", "orthogonal", "pissa", "loram"])
def test_bf16_base_starts_exactly_enough_and_exports(bases, data, tmp_path, method):
    case = run_case(bases["llama"], data, tmp_path, method, "alpha=r", dtype=torch.bfloat16)
    scale = float(case.base_logits.abs().max())
    assert largest(case.start_logits, case.base_logits) <= 0.01 * scale
    assert torch.equal(case.trained_disabled, case.base_logits)
    assert all(t.dtype == torch.float32 for t in load_file(case.adapter / "adapter_model.safetensors").values())


def export_check(bases, data, adapter, expected):
    return check(
        bases["llama"], adapter, prompts(data.samples), expected, source_rank=4, base_sha256="x",
        dtype=torch.float32, device=CPU, on_event=lambda event: None,
    )  # fmt: skip


def test_export_check_passes_for_the_right_adapter_and_fails_for_a_wrong_one(bases, data, tmp_path):
    model = load_model(bases["llama"], dtype=torch.float32, device=CPU)
    lora = Lora.model_validate({"init": "loram", "r": 4}).resolved()[0]
    probe = collate(data.samples[:2], pad=0)
    initialize(model, find_targets(model, "all-linear"), lora, seed=0, probe=probe, on_event=lambda e: None)
    with torch.no_grad():
        next(iter(adapted(model).values())).B.add_(0.1)
    export(model, tmp_path, root="tests/llama", rslora=False)
    expected = record(model, prompts(data.samples), on_event=lambda e: None)
    good = export_check(bases, data, tmp_path, expected)
    require(good)
    assert (good["passed"], good["export_rank"], good["prompts"]) == (True, 8, 12)

    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if "lora_A" in n)
    tensors[name][4:] *= -1  # the offset with the wrong sign: what plain A, B on the base would be close to
    save_file(tensors, path)
    bad = export_check(bases, data, tmp_path, expected)
    assert not bad["passed"]
    with pytest.raises(ExportCheckFailed, match="logits differ"):
        require(bad)


def test_export_check_notices_tensors_that_no_loader_reads(bases, data, tmp_path):
    model = load_model(bases["llama"], dtype=torch.float32, device=CPU)
    lora = Lora.model_validate({"init": "kaiming", "r": 4}).resolved()[0]
    probe = collate(data.samples[:2], pad=0)
    initialize(model, find_targets(model, "all-linear"), lora, seed=0, probe=probe, on_event=lambda e: None)
    export(model, tmp_path, root="tests/llama", rslora=False)
    expected = record(model, prompts(data.samples), on_event=lambda e: None)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    first = next(iter(tensors))
    tensors[first.replace("layers.0", "layers.9")] = tensors.pop(first)
    save_file(tensors, path)
    found = export_check(bases, data, tmp_path, expected)
    assert found["max_abs_logit_difference"] == 0.0  # B is zero, so logits cannot tell
    assert not found["passed"]


def test_targets_whose_suffix_also_names_other_layers_are_written_in_full(bases, data, tmp_path):
    model = load_model(bases["gpt2"], dtype=torch.float32, device=CPU)
    lora = Lora.model_validate({"init": "kaiming", "r": 4}).resolved()[0]
    targets = find_targets(model, "attention")
    initialize(model, targets, lora, seed=0, probe=collate(data.samples[:2], pad=0), on_event=lambda e: None)
    export(model, tmp_path, root="tests/gpt2", rslora=False)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(targets)
    assert config["fan_in_fan_out"] is True


def test_conv1d_factors_have_the_orientation_of_the_map(cases):
    case = cases["gpt2", "loram", "alpha=r"]
    tensors = load_file(case.adapter / "adapter_model.safetensors")
    name = "base_model.model.transformer.h.0.mlp.c_fc.lora_{}.weight"
    assert tensors[name.format("A")].shape == (8, 32)
    assert tensors[name.format("B")].shape == (128, 8)


def test_weight_of_conv1d_is_out_by_in(bases):
    model = load_model(bases["gpt2"], dtype=torch.float32, device=CPU)
    module = find_targets(model, ["c_fc"])["transformer.h.0.mlp.c_fc"]
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(module(x), x @ weight_of(module).T + module.bias, atol=1e-6)
