"""Before the first step: what PEFT cannot read, or reads otherwise, ends a run that has cost nothing yet."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lorainit.config.errors import ExportCheckFailed, UnsupportedModel
from lorainit.config.events import Message, Metrics, Stage, Tick
from lorainit.config.spec import Lora
from lorainit.context import RunRequest
from lorainit.export import check, early_check, outputs
from lorainit.export.early_check import make_trial_adapter
from lorainit.init import stage as init_stage
from lorainit.model import base as base_module
from lorainit.model.layers.layer import LoRALinear
from lorainit.model.load import load_model
from lorainit.model.targets.targets import find_targets
from lorainit.run import run, run_together
from lorainit.runtime import devices
from tests.lorainit.conftest import measure_nothing
from tests.lorainit.export.test_check import K, Q, in_config, in_file

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _measure_nothing(monkeypatch):
    measure_nothing(monkeypatch)


def go(spec, out):
    """The events of a run, also of one that failed."""
    events = []
    with suppress(ExportCheckFailed, UnsupportedModel):
        run(spec, out, events.append)
    return events


def proofs(events):
    return [e for e in events if isinstance(e, Message) and "proof" in e.data]


@pytest.fixture
def loads(monkeypatch):
    """The devices on which copies of the base were loaded."""
    found = []

    def load(folder, *, device, **options):
        found.append(device)
        return load_model(folder, device=device, **options)

    monkeypatch.setattr(base_module, "load_model", load)
    return found


def test_a_run_says_that_its_download_is_proven_before_it_initializes(spec, tmp_path):
    events = go(spec(), tmp_path)
    (said,) = proofs(events)
    assert said.data["kind"] == "export"
    assert said.message.startswith("Stock PEFT 0.")
    assert "14 layers were compared one by one" in said.message
    stage = next(i for i, e in enumerate(events) if isinstance(e, Stage) and e.stage == "initializing")
    begun = next(i for i, e in enumerate(events) if isinstance(e, Message) and e.data.get("kind") == "init")
    assert stage < events.index(said) < begun
    assert sum(isinstance(e, Tick) for e in events[stage : events.index(said)]) > 2 * 14  # a watchdog sees life
    manifest = json.loads((tmp_path / "adapter/manifest.json").read_text())
    assert manifest["proof"] == said.data["proof"]
    assert manifest["proof"]["versions"].keys() == {"peft", "transformers", "torch"}
    assert not list(tmp_path.glob(".proof*"))


FAULTS = {
    "a layer that is lost": (in_file(lambda t: t[f"{K.format(0)}.lora_B.weight"].zero_()), f"{K.format(0)}: what it"),
    "another alpha": (in_config(lambda c: c.update(lora_alpha=2 * c["lora_alpha"])), f"{Q.format(0)}: what it adds"),
    "nothing to load": (in_config(lambda c: c.update(target_modules=["none"])), "loading it failed: NoMatching"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("init", ["kaiming", "loram"])
def test_what_peft_reads_otherwise_ends_before_any_evidence_is_collected(spec, tmp_path, monkeypatch, fault, init):
    """Also where the start is a product of zero, and in difference form: the trial's factors do something."""
    change, text = FAULTS[fault]
    write = outputs.write_factors

    def wrong(job, layers, folder):
        rank = write(job, layers, folder)
        change(folder)
        return rank

    monkeypatch.setattr(outputs, "write_factors", wrong)
    monkeypatch.setattr(init_stage, "start", lambda *args: pytest.fail("the initialization has begun"))
    with pytest.raises(ExportCheckFailed, match=f"so nothing was trained: {text}") as caught:
        run(spec(lora={"init": init}), tmp_path, lambda event: None)
    assert caught.value.code == "export_check_failed"
    assert not list(tmp_path.glob("*adapter*"))
    assert not list(tmp_path.glob(".proof*"))


def test_a_base_that_reads_a_layers_weight_past_its_forward_is_refused_with_the_layers_name(
    spec, tmp_path, monkeypatch
):
    """As Mamba's kernels do: nothing that stands in the layer's place takes part."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: nn.functional.linear(x, self.down_proj.weight.T[:32, :]))
    with pytest.raises(UnsupportedModel, match=r"does not run with adapted layers \(model.layers.0.mlp.down_proj\)"):
        run(spec(), tmp_path, lambda event: None)
    assert not [e for e in go(spec(), tmp_path) if isinstance(e, Metrics)]


def test_a_base_on_which_no_adapter_can_do_anything_is_refused_before_it_is_trained(spec, bases, tmp_path):
    """One layer so loud that the rest is lost behind its last digit, in float64 too."""
    loud = Path(shutil.copytree(bases["llama"], tmp_path / "loud"))
    weights = load_file(loud / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 1e30
    save_file(weights, loud / "model.safetensors", metadata={"format": "pt"})
    deaf = spec()
    deaf = deaf.model_copy(update={"model": deaf.model.model_copy(update={"source": str(loud)})})
    with pytest.raises(UnsupportedModel, match="Adapters on these layers do not change") as caught:
        run(deaf, tmp_path / "out", lambda event: None)
    assert caught.value.param == "model"


def test_a_model_that_runs_past_pefts_layer_is_noticed_though_each_layer_by_itself_is_right(
    spec, tmp_path, monkeypatch
):
    with_peft = check.load_with_stock_peft

    def bypassed(base, folder):
        model = with_peft(base, folder)
        module = model.get_base_model().get_submodule("model.layers.1.mlp")
        module.forward = lambda x: nn.functional.linear(x, module.down_proj.weight.T[:32, :])
        return model

    monkeypatch.setattr(check, "load_with_stock_peft", bypassed)
    with pytest.raises(ExportCheckFailed, match="the logits of"):
        run(spec(), tmp_path, lambda event: None)


@torch.no_grad()
def test_the_trial_does_something_in_every_layer_whatever_the_method_starts_with(bases):
    model = load_model(bases["llama"], dtype=torch.float32, device=CPU)
    for options in ({"init": "kaiming"}, {"init": "loram"}, {"init": "eva"}, {"use_dora": True, "init": "kaiming"}):
        lora = Lora.model_validate({"r": 4, **options}).resolve()[0]
        for layer in make_trial_adapter(find_targets(model, "all-linear"), lora, device=CPU).values():
            assert isinstance(layer, LoRALinear)
            x = torch.randn(64, layer.A.shape[1], generator=torch.Generator().manual_seed(0))
            assert 0.005 < float((layer(x) - layer.base(x)).norm() / x.norm()) < 0.5
            assert (layer.A0 is not None) == (options["init"] == "loram")
    ranks = {len(layer.A) for layer in make_trial_adapter(find_targets(model, "all-linear"), lora, device=CPU).values()}
    assert ranks == {4}


# --- once is enough ------------------------------------------------------------------------------


def test_members_of_a_group_with_the_same_layout_are_proven_once(spec, tmp_path):
    brief = {"training": {"max_steps": 1, "checkpoint_interval": 1}}
    specs = [spec(**brief, **change) for change in ({}, {"seed": 3}, {"lora": {"r": 2}}, {"lora": {"alpha": 3.0}})]
    events = [[] for _ in specs]
    list(run_together([RunRequest(s, tmp_path / str(i), events[i].append) for i, s in enumerate(specs)]))
    assert [len(proofs(heard)) for heard in events] == [1, 0, 1, 1]
    known = [json.loads((tmp_path / str(i) / "adapter/manifest.json").read_text())["proof"] for i in range(2)]
    assert known[0] == known[1]


def test_a_resumed_run_takes_the_proof_of_its_first_attempt_unless_the_reader_is_another(spec, tmp_path, monkeypatch):
    brief = {"max_steps": 2, "checkpoint_interval": 1}
    go(spec(training=brief), tmp_path / "one")
    resumed = spec(training=brief, resume_from=str(tmp_path / "one/checkpoints/step-000001"))
    assert proofs(go(resumed, tmp_path / "two")) == []
    manifests = [json.loads((tmp_path / name / "adapter/manifest.json").read_text()) for name in ("one", "two")]
    assert manifests[0]["proof"] == manifests[1]["proof"]
    monkeypatch.setattr(early_check, "package_versions", lambda: {**devices.package_versions(), "peft": "0.99"})
    assert len(proofs(go(resumed, tmp_path / "three"))) == 1


# --- room for a second base ----------------------------------------------------------------------


def test_without_room_for_a_second_base_the_run_says_so_and_checks_at_the_end(spec, tmp_path, loads, monkeypatch):
    monkeypatch.setattr(devices, "free_bytes", lambda device: 1000)
    events = go(spec(), tmp_path)
    (said,) = proofs(events)
    assert (said.level, said.data["proof"]) == ("warn", None)
    assert loads == [CPU, CPU]  # the one to train on, and the one to check on
    manifest = json.loads((tmp_path / "adapter/manifest.json").read_text())
    assert manifest["proof"] is None
    assert manifest["export_check"]["passed"] is True


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")]
)
@pytest.mark.parametrize("when", ["loading", "comparing"])
def test_a_second_base_that_does_not_fit_after_all_is_tried_elsewhere(spec, tmp_path, loads, monkeypatch, when, error):
    """As where others use the device too; here a device of the same machine."""
    tried, (place, name) = [], {"loading": (base_module.Base, "copy_on"), "comparing": (check, "check")}[when]
    works = getattr(place, name)

    def runs_out_once(*args, **options):
        tried.append(args)
        if len(tried) == 1 + (when == "loading"):  # the base to train on is loaded first
            raise error
        return works(*args, **options)

    monkeypatch.setattr(place, name, runs_out_once)
    monkeypatch.setattr(base_module.Base, "_devices", lambda self: [CPU, CPU])
    (said,) = proofs(go(spec(), tmp_path))
    assert said.data["proof"]["modules"] == 14
    assert len(loads) == (3 if when == "loading" else 4)


def test_free_memory_is_what_this_machine_says():
    free = devices.free_bytes(CPU)
    assert free is not None
    assert 2**20 < free < 2**50


def test_files_that_were_read_take_no_memory_from_a_container(tmp_path):
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    for name, text in (("max", "1000"), ("current", "900"), ("stat", "anon 100\ninactive_file 700\n")):
        (group / f"memory.{name}").write_text(text)
    assert devices.free_bytes(CPU, tmp_path) == 800
    (group / "memory.max").write_text("max")
    assert devices.free_bytes(CPU, tmp_path) is None
