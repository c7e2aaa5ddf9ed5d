"""The number format of a run: what "auto" becomes where, and bf16 refused where there is none."""

import json
from types import MappingProxyType

import pytest
import torch
from pydantic import ValidationError

from lorainit.config.errors import CheckpointMismatch, UnsupportedModel
from lorainit.config.events import Message, Plan
from lorainit.config.spec import Hyperparameters
from lorainit.run import run
from lorainit.runtime.devices import dtype_of, has_bf16, resolve_precision

pytestmark = pytest.mark.usefixtures("training_only")

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FIELD = "training.precision"


@pytest.fixture
def machine(monkeypatch):
    """A processor with these capabilities, and a GPU with or without bf16."""

    def make(*capabilities, gpu=False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: MappingProxyType(dict.fromkeys(capabilities, True)))
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: gpu)

    return make


@pytest.mark.parametrize("capability", ["avx512_bf16", "amx_bf16", "bf16"])
def test_a_processor_has_bf16_by_avx512_amx_or_arm(machine, capability):
    machine("avx2", capability)
    assert has_bf16(CPU)


def test_avx512_alone_only_emulates_it(machine):
    machine("avx2", "avx512_f", "avx512_bw")
    assert not has_bf16(CPU)


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_bf16_is_refused_with_its_field_where_there_is_none(machine, device):
    machine("avx2")
    with pytest.raises(UnsupportedModel, match="has no bf16: ask for precision fp32 or auto") as caught:
        resolve_precision(Hyperparameters(precision="bf16"), device)
    assert (caught.value.param, caught.value.code) == (FIELD, "unsupported_model")


def test_the_refusal_comes_before_anything_is_read(machine, spec, tmp_path):
    machine("avx2")
    (tmp_path / "rows.jsonl").write_text("no rows")
    files = {"training": str(tmp_path / "rows.jsonl")}
    wanted = spec(training={"precision": "bf16"}, model={"source": "nowhere"}, data=files)
    with pytest.raises(UnsupportedModel, match="bf16"):
        run(wanted, tmp_path, lambda event: None)


@pytest.mark.parametrize(
    ("device", "gpu", "wanted"), [(CPU, False, "fp32"), (GPU, True, "bf16"), (GPU, False, "fp32")], ids=str
)
def test_auto_is_bf16_on_a_gpu_that_has_it_and_says_why(machine, device, gpu, wanted):
    machine("avx512_bf16", gpu=gpu)
    training, (choice,) = resolve_precision(Hyperparameters(), device)
    assert (training.precision, choice.param, choice.value) == (wanted, FIELD, wanted)
    assert len(choice.reason) > 10


@pytest.mark.parametrize("asked", ["fp32", "bf16"])
def test_what_was_asked_for_is_never_changed(machine, asked):
    machine("bf16", gpu=True)
    for device in (CPU, GPU):
        assert resolve_precision(Hyperparameters(precision=asked), device) == (Hyperparameters(precision=asked), [])


def test_formats_have_their_dtypes():
    assert [dtype_of(name) for name in ("fp32", "bf16")] == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("value", ["fp16", "int8", 16])
def test_other_formats_are_refused(value):
    with pytest.raises(ValidationError):
        Hyperparameters(precision=value)


def test_the_plan_the_spec_and_the_manifest_say_which(spec, tmp_path):
    events = []
    run(spec(), tmp_path, events.append)
    (plan,) = [e for e in events if isinstance(e, Plan)]
    assert (plan.precision, [c.param for c in plan.choices]) == ("fp32", [FIELD])
    assert "precision = fp32 (" in "".join(e.message for e in events if isinstance(e, Message))
    assert json.loads((tmp_path / "spec.json").read_text())["training"]["precision"] == "fp32"
    assert json.loads((tmp_path / "adapter/manifest.json").read_text())["training"]["precision"] == "fp32"


def test_a_checkpoint_of_another_precision_is_another_recipe(spec, tmp_path):
    run(spec(), tmp_path / "first", lambda event: None)
    point = str(tmp_path / "first/checkpoints/step-000002")
    with pytest.raises(CheckpointMismatch, match="spec differ"):
        run(spec(training={"precision": "bf16"}, resume_from=point), tmp_path / "second", lambda event: None)
