"""Compiled layers train what plain ones train, and a compiler that fails ends no run."""

import pytest
import torch
from transformers import AttentionInterface

from lorainit.config.errors import UnusableDevice
from lorainit.config.events import Message
from lorainit.model.forward import attention, compiled
from lorainit.model.forward.recompute import layers_of
from lorainit.model.layers.group import GroupedLinear
from lorainit.model.layers.layer import LoRALinear
from lorainit.run import run
from tests.lorainit.conftest import tiny_llama
from tests.lorainit.shortage import adapter, close, told

pytestmark = pytest.mark.usefixtures("training_only")


@pytest.fixture
def model():
    return tiny_llama(64, 128).requires_grad_(False)


@pytest.fixture
def afterwards(monkeypatch):
    """What is kept out of compilation is as it was, once the test is over."""
    for kind in (LoRALinear, GroupedLinear):
        monkeypatch.setattr(kind, "forward", kind.forward)
    yield
    AttentionInterface.register(attention.NAME, attention.attend)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:The .grad attribute:UserWarning")
@pytest.mark.usefixtures("afterwards")
def test_a_run_whose_compilation_fails_goes_on_and_says_so(wanted, tmp_path, monkeypatch):
    def broken(*_):
        raise OSError("no compiler here\nand a long story")

    compile_layers = compiled.compile_layers

    def with_a_broken_backend(model):
        compile_layers(model)
        for layer in layers_of(model):
            layer.compile(backend=broken)

    plain = run(wanted(), tmp_path / "plain", lambda event: None)
    monkeypatch.setattr(compiled, "compile_layers", with_a_broken_backend)
    heard = []
    done = run(wanted(training={"compile": True, "batch_size": 4}), tmp_path / "out", heard.append)
    (warning,) = [event for event in heard if isinstance(event, Message) and event.data.get("compiled") is False]
    assert warning.level == "warn"
    assert "no compiler here" in warning.message
    assert "\n" not in warning.message
    assert all(torch.equal(tensor, adapter(plain)[name]) for name, tensor in adapter(done).items())


@pytest.mark.parametrize("said", ["CUDA error: unspecified launch failure", "CUDA error: device-side assert triggered"])
def test_a_gpu_that_fails_while_layers_are_compiled_is_not_told_as_a_failed_compiler(
    wanted, tmp_path, monkeypatch, said
):
    def fail(*_):
        raise RuntimeError(said)

    monkeypatch.setattr(compiled, "compile_layers", lambda model: layers_of(model)[0].register_forward_pre_hook(fail))
    heard = []
    with pytest.raises((UnusableDevice, RuntimeError), match=said.removeprefix("CUDA error: ")):
        run(wanted(training={"compile": True, "batch_size": 4}), tmp_path / "out", heard.append)
    assert not [event for event in heard if isinstance(event, Message) and event.data.get("compiled") is False]


def test_when_compiling_pays(model, monkeypatch):
    monkeypatch.setattr(compiled, "PAYS_FROM", 1e6)
    assert not compiled.is_worth_compiling(model, tokens=10**9)[0], "float32"
    model.to(torch.bfloat16)
    assert compiled.is_worth_compiling(model, tokens=10**9)[0]
    assert "too short" in compiled.is_worth_compiling(model, tokens=1)[1]
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "none")
    assert "compiler" in compiled.is_worth_compiling(model, tokens=10**9)[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:The .grad attribute:UserWarning")
@pytest.mark.usefixtures("afterwards")
def test_compiled_layers_train_what_plain_ones_train(wanted, tmp_path):
    plain = run(wanted(), tmp_path / "plain", lambda event: None)
    heard = []
    done = run(wanted(training={"compile": True, "batch_size": 4}), tmp_path / "compiled", heard.append)
    assert told(heard)[-1]["compiled"] is True
    assert close(adapter(done), adapter(plain), atol=1e-5)
