"""A base that two processes divide between them: what comes of it is what comes of one that holds it whole."""

import fcntl
import json
import os
import signal
import time
import types
from pathlib import Path

import psutil
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from lorainit.config.errors import TooFewDevices, UnsupportedModel
from lorainit.config.spec import RunSpec
from lorainit.init.methods import METHODS
from lorainit.model.load import load_model
from lorainit.model.shard import explain_sharding, shard
from lorainit.run import run
from lorainit.runtime.distributed.world import World
from tests.lorainit.conftest import only_training
from tests.lorainit.contexts import prepared
from tests.lorainit.forked import Forked
from tests.lorainit.ranks import run_ranks
from tests.zoo.bases import make

# One for each kind of what an initialization looks at, where no case below has it; the others do nothing else with a
# base that is divided.
KINDS = ("lora_one", "hrp")
ALIKE = [name for name in METHODS if name not in (*KINDS, "loftq")]  # loftq needs a base in four bits
CASES = (*KINDS, "gpt2", "dora", "kept", "experts")
# These are tried with PEFT before the first step, and measured; for the others it would be the same again.
WHOLE = ("gpt2", "experts")
TRAINING = {"max_steps": 3, "eval_interval": 2, "checkpoint_interval": 100}


def quiet(_event) -> None:
    """Nobody listens."""


def shared(spec: RunSpec, **update) -> dict:
    training = spec.training.model_copy(update={"shard_base": True})
    return spec.model_copy(update={"devices": 2, "training": training} | update).model_dump(mode="json")


@pytest.fixture(scope="module")
def cases(bases, rows, tmp_path_factory):
    """What both processes run, one after the other: five rows a step in pieces of two, so that one has less to do."""

    def spec(base="llama", **lora):
        return RunSpec.model_validate(
            {
                "model": {"id": base, "source": str(bases[base]), "root": f"tests/{base}", "max_length": 256},
                "data": {"training": str(rows), "validation": str(rows)},
                "lora": {"init": "kaiming", "r": 4, **lora},
                "training": {**TRAINING, "batch_size": 5, "learning_rate": 1e-3},
                "micro_batch_size": 2,
            }
        )

    folder = tmp_path_factory.mktemp("mixture")
    found = {name: spec(init={"method": name}) for name in (*KINDS, *ALIKE)}
    found |= {"gpt2": spec("gpt2", init="pissa"), "dora": spec(use_dora=True), "dropped": spec(dropout=0.1)}
    mixture = found["eva"].model.model_copy(update={"source": str(make("gpt_oss", folder))})
    found["experts"] = found["eva"].model_copy(update={"model": mixture})
    kept = found["corda"].training.model_copy(update={"gradient_checkpointing": False})
    found["kept"] = found["corda"].model_copy(update={"training": kept})
    return found


@pytest.fixture(scope="module")
def begun_by_one(cases, tmp_path_factory):
    """The folder of a run with checkpoints, by one process that holds all of the base."""
    folder = tmp_path_factory.mktemp("one")
    run_by_one(halfway(cases), folder)
    return folder


@pytest.fixture(scope="module")
def pair(cases, begun_by_one, stopped, tmp_path_factory):
    """The folder of what two processes made of all cases but those of `pair_of_alike`, one after the other.

    "begun" and "straight" go through; "gone on" and "resumed" begin with the checkpoints of others.
    """
    folder = tmp_path_factory.mktemp("pair")
    given = {name: shared(cases[name]) for name in CASES}
    bad = cases["kaiming"].data.model_copy(update={"training": str(folder / "none.jsonl")})
    (folder / "none.jsonl").write_text("no row\n")
    given["bad"] = shared(cases["kaiming"], data=bad)
    given["begun"] = shared(halfway(cases))
    given["gone on"] = shared(halfway(cases, resume_from=str(point(begun_by_one))))
    (checkpoint,) = (stopped / "checkpoints").iterdir()
    given["straight"] = shared(long(cases))
    given["resumed"] = shared(long(cases), resume_from=str(checkpoint))
    run_by(2, given, folder)
    return folder


@pytest.fixture(scope="module")
def pair_of_alike(cases, tmp_path_factory):
    """What two processes made of the other initializations."""
    folder = tmp_path_factory.mktemp("alike")
    run_by(2, {name: shared(cases[name]) for name in ALIKE}, folder)
    return folder


@pytest.fixture(scope="module")
def stopped(cases, tmp_path_factory):
    """The folder of a divided run that was asked to stop before its end.

    It cannot end before it is asked, because its pipe takes the events of a few steps only, and then it waits.
    """
    folder = tmp_path_factory.mktemp("stopped")
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    process = by_command_line(shared(long(cases)), folder, events=writer)
    os.close(writer)
    with os.fdopen(reader, "rb", buffering=0) as told:
        assert any(is_second_step(json.loads(line)) for line in told)
        process.terminate()
        told.readall()
    said = process.communicate(timeout=600)[1]
    assert process.returncode == 143, said
    return folder


def is_second_step(event: dict) -> bool:
    return event["kind"] == "metrics" and event["step"] == 2


def run_by_one(spec: RunSpec, folder: Path) -> None:
    """Train as one process does: what it is compared with. Its download is not the subject here."""
    with only_training():
        run(spec, folder, quiet)


def run_by(size: int, given: dict[str, dict], folder: Path) -> None:
    """Let so many processes run all of these specs."""
    (folder / "specs.json").write_text(json.dumps(given))
    (folder / "whole.json").write_text(json.dumps(WHOLE))
    run_ranks("tests.lorainit.pair", size, folder)


def halfway(cases: dict[str, RunSpec], **update) -> RunSpec:
    """A run with dropout that leaves a checkpoint after two of its four steps."""
    training = cases["dropped"].training.model_copy(update={"max_steps": 4, "checkpoint_interval": 2})
    return cases["dropped"].model_copy(update={"training": training, **update})


def long(cases: dict[str, RunSpec]) -> RunSpec:
    """A run that can be stopped before its end."""
    update = {"max_steps": 30, "eval_interval": 100, "checkpoint_interval": 500}
    return cases["pissa"].model_copy(update={"training": cases["pissa"].training.model_copy(update=update)})


def point(folder: Path) -> Path:
    return folder / "checkpoints" / "step-000002"


def found(pair, name):
    return [json.loads((pair / name / f"found-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_a_divided_base_trains_the_adapter_that_a_whole_one_trains(name, cases, pair, tmp_path):
    require_the_adapter_of_one(name, cases, pair, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALIKE)
def test_a_divided_base_trains_what_a_whole_one_trains_by_every_initialization(name, cases, pair_of_alike, tmp_path):
    require_the_adapter_of_one(name, cases, pair_of_alike, tmp_path)


def require_the_adapter_of_one(name, cases, pair, tmp_path):
    assert [one["error"] for one in found(pair, name)] == [None, None]
    run_by_one(cases[name], tmp_path / "alone")
    require_same(pair / name, tmp_path / "alone", points=4)


def require_same(ours: Path, theirs: Path, *, points: int) -> None:
    """The same adapter and the same log, up to rounding."""
    factors, others = (load_file(where / "adapter" / "adapter_model.safetensors") for where in (ours, theirs))
    assert factors.keys() == others.keys()
    for key, tensor in factors.items():
        assert torch.allclose(tensor, others[key], rtol=1e-3, atol=5e-6), key
    logs = [(where / "metrics.jsonl").read_text().splitlines() for where in (ours, theirs)]
    assert len(logs[0]) == len(logs[1]) == points
    for line, expected in zip(*(map(json.loads, log) for log in logs), strict=True):
        for number in ("train_loss", "full_valid_loss"):
            assert line[number] is expected[number] is None or abs(line[number] - expected[number]) < 1e-5


def test_two_processes_train_with_the_dropout_of_one(begun_by_one, pair):
    """Masks belong to the place of a micro-batch in its step, whoever computes it."""
    assert [one["error"] for one in found(pair, "begun")] == [None, None]
    require_same(pair / "begun", begun_by_one, points=5)


def test_what_one_process_began_two_go_on_with(begun_by_one, pair):
    assert [one["error"] for one in found(pair, "gone on")] == [None, None]
    require_same(pair / "gone on", begun_by_one, points=5)


def test_what_two_processes_began_one_goes_on_with(cases, begun_by_one, pair, tmp_path):
    run_by_one(halfway(cases, resume_from=str(point(pair / "begun"))), tmp_path)
    require_same(tmp_path, begun_by_one, points=5)


@pytest.mark.slow
@pytest.mark.parametrize("divided", [True, False])
def test_what_two_processes_began_three_go_on_with(cases, begun_by_one, pair, tmp_path, divided):
    spec = halfway(cases, resume_from=str(point(pair / "begun")))
    training = spec.training.model_copy(update={"shard_base": divided})
    run_by(3, {"by three": shared(spec, devices=3, training=training)}, tmp_path)
    require_same(tmp_path / "by three", begun_by_one, points=5)


def test_each_process_holds_half_of_every_layer_and_all_that_is_no_layer(cases, pair):
    model = load_model(Path(cases["kaiming"].model.source), dtype=torch.float32, device=torch.device("cpu"))
    layers = sum(p.nbytes for layer in model.model.layers for p in layer.parameters())
    others = sum(p.nbytes for p in model.parameters()) - layers
    for one in found(pair, "lora_one"):
        trained_on, checked_on = one["held"]
        assert others + 0.5 * layers <= trained_on <= others + 0.55 * layers
        assert checked_on > trained_on  # the download is checked on a divided base too, with the adapter on it


def test_the_adapter_of_a_divided_base_is_checked_and_what_bf16_keeps_is_not_measured(pair):
    manifest = json.loads((pair / "gpt2" / "adapter" / "manifest.json").read_text())
    check = manifest["export_check"]
    assert check["passed"] is True
    assert set(check["fidelity"]["missing"].values()) == {"the base is divided between devices"}
    leading = found(pair, "gpt2")[0]
    assert "Each of 2 devices holds a part of the base: it was asked for" in leading["messages"]
    assert any(text.startswith("Gradient checkpointing is on: the base is divided") for text in leading["messages"])
    assert any("was not measured: the base is divided" in text for text in leading["messages"])
    assert not list((pair / "gpt2").glob("**/init/*"))


def test_what_is_wrong_with_the_rows_is_the_same_for_both(pair):
    assert [one["error"] for one in found(pair, "bad")] == ["invalid_training_file"] * 2


# --- stopped, or killed -----------------------------------------------------------------------------


def by_command_line(spec: dict, out: Path, *, events: int | None = None) -> Forked:
    out.mkdir(exist_ok=True)
    file = out / "order.json"
    file.write_text(json.dumps(spec))
    return Forked([file, out], events=events)


def await_steps(process: Forked, log: Path) -> None:
    while not log.exists() or len(log.read_text().splitlines()) < 5:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


def test_a_divided_run_that_is_stopped_goes_on_with_the_same_bits(pair, stopped):
    assert len((stopped / "metrics.jsonl").read_text().splitlines()) <= 30, "it was not stopped before its end"
    straight, resumed = (
        (pair / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("straight", "resumed")
    )
    assert straight == resumed


@pytest.mark.slow
def test_a_process_that_is_killed_takes_a_divided_run_with_it(cases, tmp_path):
    training = {**cases["kaiming"].training.model_dump(), "max_steps": 100_000, "checkpoint_interval": 100_000}
    spec = RunSpec.model_validate({**cases["kaiming"].model_dump(mode="json"), "training": training})
    leading = by_command_line(shared(spec), tmp_path / "out")
    await_steps(leading, tmp_path / "out" / "metrics.jsonl")
    (other,) = psutil.Process(leading.pid).children()
    other.kill()
    said = leading.communicate(timeout=600)[1]
    assert leading.returncode == -signal.SIGKILL, said


# --- refused, or not done -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        ({"devices": 1}, "the job has one"),
        ({"devices": 2, "lora": {"init": "kaiming", "r": 4, "quantization": "nf4"}}, "quantized base"),
        ({"devices": 2, "training": {"shard_base": True, "compile": True}}, "compile"),
    ],
)
def test_what_cannot_be_divided_is_refused(spec, update, reason):
    with pytest.raises(ValidationError, match=reason):
        spec(**{"training": {"shard_base": True}} | update)


def test_a_process_that_is_alone_refuses_to_divide(spec, tmp_path):
    with pytest.raises(TooFewDevices, match="this one is alone"):
        run(spec(devices=2, training={"shard_base": True}), tmp_path, quiet)


def test_layers_that_share_a_weight_are_not_divided(bases):
    model = load_model(bases["llama"], dtype=torch.float32, device=torch.device("cpu"))
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    second.weight = first.weight
    with pytest.raises(UnsupportedModel, match="share a weight"):
        shard(model, torch.device("cpu"), world=World(0, 2))


def test_an_architecture_that_does_not_name_its_layers_is_refused():
    with pytest.raises(UnsupportedModel) as refused:
        shard(torch.nn.Linear(2, 2), torch.device("cpu"), world=World(0, 2))
    assert refused.value.param == "training.shard_base"


@pytest.mark.parametrize(
    ("gib", "size", "elsewhere", "divided"),
    [(1000.0, 2, False, False), (1e-4, 2, False, True), (1000.0, 2, True, True), (1e-4, 1, False, False)],
    ids=["it fits", "it does not", "it does not on the other device", "there is one device"],
)
def test_left_to_the_machine_a_base_is_divided_where_it_does_not_fit(
    spec, bases, monkeypatch, gib, size, elsewhere, divided
):
    """No GPU is asked: its memory is what a stand-in says, and so is what the other process finds."""
    memory = types.SimpleNamespace(total_memory=int(gib * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: memory)
    monkeypatch.setattr(World, "any_rank", lambda self, flag, device: flag or elsewhere)
    devices = {"dtype": torch.float32, "device": torch.device("cuda")}
    answer = explain_sharding(spec(devices=2), bases["llama"], world=World(0, size), **devices)
    assert ("too much for one of them" in answer, bool(answer)) == (divided, divided)


def test_left_to_the_machine_a_cpu_divides_nothing(spec, bases):
    assert (
        explain_sharding(
            spec(devices=2), bases["llama"], world=World(0, 2), dtype=torch.float32, device=torch.device("cpu")
        )
        == ""
    )


def test_a_checkpoint_does_not_ask_who_held_the_base(spec, tmp_path):
    whole, divided = (spec(devices=2, training={"shard_base": value}) for value in (False, "auto"))
    recipes = [prepared(one, tmp_path).recipe for one in (whole, divided)]
    assert recipes[0] == recipes[1]
