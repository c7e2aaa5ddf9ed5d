"""The check of every download, and what is written for a loader to find."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorainit.batches import collate
from lorainit.data import load
from lorainit.errors import ExportCheckFailed
from lorainit.export.check import check, prompts, record, require
from lorainit.export.peft_adapter import export
from lorainit.initialize import initialize
from lorainit.layer import adapted
from lorainit.model.load import load_model
from lorainit.model.targets import find_targets
from lorainit.spec import Lora
from lorainit.weight import weight_of
from tests.lorainit.conftest import make_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(rows):
    return load(rows, make_tokenizer(), max_length=256)


def export_check(bases, data, adapter, expected):
    return check(
        load_model(bases["llama"], dtype=torch.float32, device=CPU), adapter, prompts(data.samples), expected,
        source_rank=4, base_sha256="x", dtype=torch.float32, on_event=lambda event: None,
    )  # fmt: skip


def test_export_check_passes_for_the_right_adapter_and_fails_for_a_wrong_one(bases, data, tmp_path):
    model = load_model(bases["llama"], dtype=torch.float32, device=CPU)
    lora = Lora.model_validate({"init": "loram", "r": 4}).resolved()[0]
    probe = collate(data.samples[:2], pad=0)
    initialize(model, find_targets(model, "all-linear"), lora, seed=0, probe=probe, on_event=lambda e: None)
    with torch.no_grad():
        next(iter(adapted(model).values())).B.add_(0.1)
    export(model, adapted(model), tmp_path, root="tests/llama")
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
    export(model, adapted(model), tmp_path, root="tests/llama")
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
    export(model, adapted(model), tmp_path, root="tests/gpt2")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(targets)
    assert config["fan_in_fan_out"] is True


def test_weight_of_conv1d_is_out_by_in(bases):
    model = load_model(bases["gpt2"], dtype=torch.float32, device=CPU)
    module = find_targets(model, ["c_fc"])["transformer.h.0.mlp.c_fc"]
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(module(x), x @ weight_of(module).T + module.bias, atol=1e-6)
