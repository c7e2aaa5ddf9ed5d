"""Experts of mixtures: untouched they are stock transformers', adapted they are stock PEFT's `target_parameters`."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from transformers import AutoModelForCausalLM

from lorainit.export.peft_adapter import export
from lorainit.layer import LoRALinear, attach
from lorainit.methods import Factors
from lorainit.model import experts
from lorainit.model.load import load_model
from lorainit.model.targets import find_targets
from lorainit.run import run
from lorainit.spec import RunSpec
from tests.zoo.bases import KINDS, make

KIND = [name for name, kind in KINDS.items() if kind.family == "mixture" and not kind.missing]
CPU, SCALE = torch.device("cpu"), 0.5
WANTED = {"qwen3_next": ["experts.gate_up_proj", "experts.down_proj", "q_proj"]}  # the last layer has attention only


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Makes the base of a kind, once."""
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = make(kind, tmp_path_factory.mktemp("bases") / kind)
        return made[kind]

    return folder


def stock(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()


def tokens():
    return torch.randint(3, 300, (3, 30), generator=torch.Generator().manual_seed(4))


def installed(folder):
    model = load_model(folder, dtype=torch.float32, device=CPU)
    assert experts.install(model)
    return model


def adapted(model, wanted):
    """Random factors, B among them, on the wanted layers; by name."""
    generator, layers = torch.Generator().manual_seed(5), {}
    for name, module in find_targets(model, wanted).items():
        A = torch.randn(3, module.in_features, generator=generator) * module.in_features**-0.5
        B = torch.randn(module.out_features, 3, generator=generator) * 0.3
        layers[name] = LoRALinear(module, Factors(A, B), scale=SCALE, subtract=False)
        attach(model, name, layers[name])
    return layers


def read_back(folder, adapter):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(stock(folder), adapter, is_trainable=True).eval()


def loss_of(model):
    logits = model(input_ids=tokens()).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())


@pytest.mark.parametrize("kind", KIND)
def test_untouched_experts_compute_what_stock_ones_do(folders, kind):
    with torch.no_grad():
        wanted = stock(folders(kind))(input_ids=tokens()).logits
        found = installed(folders(kind))(input_ids=tokens()).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KIND)
def test_values_and_gradients_of_adapted_experts_are_those_of_stock_peft(folders, kind, tmp_path):
    model = installed(folders(kind))
    layers = adapted(model, ["experts.gate_up_proj", "experts.down_proj"])
    export(model, layers, tmp_path, root="tests/mixture")
    theirs = read_back(folders(kind), tmp_path)
    ours, reference = loss_of(model), loss_of(theirs)
    torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)
    ours.backward()
    reference.backward()
    compared = 0
    for name, wrapper in theirs.named_modules():
        if isinstance(wrapper, ParamWrapper):
            parameter = f"{name.removeprefix('base_model.model.').replace('.base_layer', '')}.{wrapper.parameter_name}"
            for number, (dA, dB) in enumerate(gradients(wrapper)):
                layer = layers[f"{parameter}.{number}"]
                zero = torch.zeros_like
                torch.testing.assert_close(
                    layer.A.grad if layer.A.grad is not None else zero(dA), dA, atol=1e-5, rtol=1e-4
                )
                torch.testing.assert_close(
                    layer.B.grad if layer.B.grad is not None else zero(dB), dB, atol=1e-5, rtol=1e-4
                )
                compared += 1
    assert compared == len(layers)


def gradients(wrapper):
    """Of the A (r×in) and B (out×r) of every expert, by PEFT's own rule for the order of the ranks."""
    A, B = wrapper.lora_A["default"].weight.grad, wrapper.lora_B["default"].weight.grad
    n = wrapper.num_experts
    pairs = zip(A.reshape(n, -1, A.shape[1]), B.reshape(len(B), -1, n).permute(2, 0, 1), strict=True)
    for dA, dB in pairs:
        # PEFT cannot know that Llama 4 stores in×out: to it the matrix is its transpose.
        yield (dB.T, dA.T) if type(wrapper.get_base_layer()).__name__ == "Llama4TextExperts" else (dA, dB)


def test_weight_of_an_expert_is_a_view_and_in_no_state_dict_twice(folders):
    model = installed(folders("gpt_oss"))
    stacks = experts.stacks(model)
    for stack in stacks.values():
        assert all(layer.weight.data_ptr() - stack.weight.data_ptr() < stack.weight.nbytes for layer in stack)
        assert (stack[1].out_features, stack[1].in_features) == tuple(stack[1].weight.shape)
    names = [name for name in model.state_dict() if ".experts." in name]
    assert len(names) == 2 * len(stacks)  # the weight and the bias of each
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in stock(folders("gpt_oss")).parameters())


def test_installing_twice_changes_nothing(folders):
    model = installed(folders("mixtral"))
    before = experts.stacks(model)
    assert experts.install(model) == before


def spec(folder, rows, **overrides):
    value = {
        "model": {"id": "mixture", "source": str(folder), "root": "tests/mixture", "max_length": 256},
        "data": {"training": str(rows)},
        "lora": {"init": "kaiming", "r": 4} | overrides.pop("lora", {}),
        "training": {"max_steps": 3, "batch_size": 5, "learning_rate": 1e-3, "precision": "fp32"},
    }
    return RunSpec.model_validate(value | overrides)


READER = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model = PeftModel.from_pretrained(base, sys.argv[2]).eval()
torch.save(model(input_ids=torch.tensor(json.loads(sys.argv[3]))).logits, sys.argv[4])
"""


def test_download_of_a_mixture_is_read_by_stock_peft_in_a_new_process(folders, rows, tmp_path):
    events = []
    done = run(spec(folders("mixtral"), rows), tmp_path / "out", events.append)
    ids = tokens()[:1, :12]
    command = [sys.executable, "-c", READER, folders("mixtral"), done.adapter, json.dumps(ids.tolist())]
    subprocess.run([*map(str, command), str(tmp_path / "logits")], check=True, capture_output=True, timeout=120)
    theirs = torch.load(tmp_path / "logits", weights_only=True)
    with torch.no_grad():
        base = stock(folders("mixtral"))(input_ids=ids).logits
        model = installed(folders("mixtral"))
        for name, module in find_targets(model, "all-linear").items():
            attach(model, name, from_checkpoint(tmp_path / "out", name, module))
        trained = model(input_ids=ids).logits
    torch.testing.assert_close(theirs, trained, atol=1e-5, rtol=1e-5)
    assert (trained - base).abs().max() > 1e-3


def from_checkpoint(out, name, module):
    """A layer as training left it, from the state that is written beside the adapter."""
    from safetensors.torch import load_file

    (state,) = (out / "checkpoints").glob("step-000003/*.safetensors")
    found = load_file(state)
    return LoRALinear(module, Factors(found[f"layer.{name}.A"], found[f"layer.{name}.B"]), scale=1.0, subtract=False)
