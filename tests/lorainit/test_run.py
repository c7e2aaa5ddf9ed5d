"""A run from beginning to end, its checkpoints, and the ways it refuses or stops."""

import csv
import errno
import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file

from lorainit.config.errors import (
    CheckpointMismatch,
    DiskFull,
    InvalidTrainingFile,
    LorainitError,
    NonFiniteLoss,
    NoTrainableTokens,
    OutOfMemory,
    RankTooLarge,
    SequenceTooLong,
    Stopped,
    UnknownTarget,
    UnsupportedModel,
)
from lorainit.config.events import EVENT, Checkpoint, Done, InitReport, Message, Metrics, Plan, Stage, Tick
from lorainit.run import run
from lorainit.train import adapter_trainer, checkpoint, loop
from lorainit.train.adapter_trainer import schedule
from tests.lorainit.conftest import chat, write_rows
from tests.lorainit.contexts import prepared

pytestmark = pytest.mark.usefixtures("training_only")


def go(spec, out):
    events = []
    run(spec, out, events.append)
    return events


def of(events, kind):
    return [event for event in events if isinstance(event, kind)]


@pytest.fixture(scope="module")
def finished(spec, rows, tmp_path_factory):
    """A run with validation, and with all of its checks: its events and its folder."""
    out = tmp_path_factory.mktemp("finished")
    return go(spec(data={"validation": str(rows)}, training={"eval_interval": 2}), out), out


@pytest.fixture(scope="module")
def plain(spec, tmp_path_factory):
    """A run of the spec as it is: its events and its folder."""
    out = tmp_path_factory.mktemp("plain")
    return go(spec(), out), out


def test_events_come_in_order_and_survive_the_pipe(finished):
    events, _ = finished
    assert [EVENT.validate_json(e.model_dump_json()) for e in events] == events
    stages = [e.stage for e in of(events, Stage)]
    rounds = ["evaluating", "training"] * 2 + ["evaluating"]
    assert stages == ["loading", "initializing", *rounds, "exporting", "verifying"]
    kinds = [e.kind for e in events if not isinstance(e, Tick | Stage)]
    wanted = ["plan", "init_report", "metrics", "checkpoint", "done"]
    assert [k for k in dict.fromkeys(kinds) if k != "message"] == wanted
    assert isinstance(events[-1], Done)


def test_metrics_have_every_step_and_the_evaluations(finished):
    events, _ = finished
    metrics = of(events, Metrics)
    assert [m.step for m in metrics] == [0, 1, 2, 3, 4]
    assert [m.full_valid_loss is not None for m in metrics] == [True, False, True, False, True]
    assert metrics[0].full_valid_loss == pytest.approx(of(events, InitReport)[0].report["base_loss"], rel=0.1)
    assert metrics[-1].full_valid_loss < metrics[0].full_valid_loss
    assert [m.tokens for m in metrics] == sorted({m.tokens for m in metrics})
    assert metrics[-1].epoch == pytest.approx(4 / 3)


def test_checkpoints_are_plain_adapters_at_their_steps(finished):
    events, out = finished
    assert [(c.step, c.metrics["step"]) for c in of(events, Checkpoint)] == [(2, 2), (4, 4)]
    assert set(of(events, Checkpoint)[0].metrics) == {
        "step", "train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy",
        "full_valid_loss", "full_valid_mean_token_accuracy",
    }  # fmt: skip
    last, final = out / "checkpoints/step-000004/adapter", out / "adapter"
    name = "adapter_model.safetensors"
    assert (last / name).read_bytes() == (final / name).read_bytes()
    assert not [p for p in out.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]
    assert not list((out / "checkpoints").glob(".*"))


def test_folder_holds_what_the_download_promises(finished):
    events, out = finished
    names = {p.name for p in (out / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json",
            "chat_template.jinja", "README.md", "init_report.json", "manifest.json"} <= names  # fmt: skip
    manifest = json.loads((out / "adapter/manifest.json").read_text())
    done = events[-1]
    assert manifest["export_check"] == done.export_check
    assert manifest["export_check"]["passed"] is True
    assert manifest["training"]["learning_rate"] == 1e-3
    assert str(out) not in json.dumps(manifest)
    assert len(json.loads((out / "adapter/init_report.json").read_text())["per_module"]) == 14
    assert done.trained_tokens == of(events, Metrics)[-1].tokens
    with (out / "step_metrics.csv").open() as stream:
        assert [row["step"] for row in csv.DictReader(stream)] == ["0", "1", "2", "3", "4"]


def test_plan_says_what_runs(finished):
    (plan,) = of(finished[0], Plan)
    assert (plan.total_steps, plan.steps_per_epoch, plan.rows, plan.modules) == (4, 3, 12, 14)
    assert (plan.micro_batch_size, plan.tokens_per_pass) == (5, 2048)
    assert plan.trainable_parameters == 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    assert plan.trainable_parameters_estimated is False
    (report,) = of(finished[0], InitReport)
    assert report.report["trainable_parameters"] == plan.trainable_parameters
    assert (plan.device, plan.precision) == ("cpu", "fp32")


def weights(out):
    return load_file(out / "adapter" / "adapter_model.safetensors")


def test_same_spec_gives_the_same_bits(spec, tmp_path):
    one, two = tmp_path / "1", tmp_path / "2"
    go(spec(lora={"init": "kaiming", "dropout": 0.1}), one)
    torch.rand(5)
    go(spec(lora={"init": "kaiming", "dropout": 0.1}), two)
    name = "adapter/adapter_model.safetensors"
    assert (one / name).read_bytes() == (two / name).read_bytes()


@pytest.mark.parametrize(
    "most",
    [
        {"micro_batch_size": 3},
        {"tokens_per_pass": 70},
        pytest.param({"micro_batch_size": 1}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_how_a_step_is_cut_into_passes_does_not_change_the_result(spec, plain, tmp_path, most):
    events, whole = plain
    pieces = go(spec(**most), tmp_path)
    assert passes_of(pieces) > passes_of(events)
    for name, value in weights(whole).items():
        assert torch.allclose(value, weights(tmp_path)[name], rtol=0, atol=2e-5), name


def passes_of(events):
    """Of the training, each of which is a tick."""
    start = next(n for n, event in enumerate(events) if isinstance(event, Stage) and event.stage == "training")
    end = next(n for n, event in enumerate(events) if isinstance(event, Stage) and event.stage == "exporting")
    return len(of(events[start:end], Tick))


def logged(out):
    """The metrics without what a clock says."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]


class Enough(Exception):
    pass


@pytest.mark.parametrize(
    "lora",
    [pytest.param({"init": "loram"}, marks=pytest.mark.slow), {"init": "kaiming", "dropout": 0.2}],
    ids=["loram", "dropout"],
)
def test_resumed_run_ends_with_the_same_bits(spec, rows, tmp_path, lora):
    options = {"lora": lora, "data": {"validation": str(rows)}, "training": {"max_steps": 6}}
    whole, first, second = tmp_path / "whole", tmp_path / "first", tmp_path / "second"
    go(spec(**options), whole)

    def die_at_step_five(event):
        if isinstance(event, Metrics) and event.step == 5:
            raise Enough

    with pytest.raises(Enough):
        run(spec(**options), first, die_at_step_five)
    events = []
    run(spec(**options, resume_from=str(first / "checkpoints/step-000004")), second, events.append)
    assert [m.step for m in of(events, Metrics)] == [5, 6]
    assert of(events, InitReport)[0].report["method"] == lora["init"]
    name = "adapter/adapter_model.safetensors"
    assert (second / name).read_bytes() == (whole / name).read_bytes()
    assert logged(second) == logged(whole)


def test_a_checkpoint_is_released_once_it_is_loaded(spec, plain, tmp_path, monkeypatch):
    read, restored, alive = checkpoint.read, [], []

    def remember(*args, **named):
        found = read(*args, **named)
        restored.append(weakref.ref(found))
        return found

    def listen(event):
        if isinstance(event, Metrics):
            alive.append(restored[0]() is not None)

    monkeypatch.setattr(checkpoint, "read", remember)
    run(spec(resume_from=str(plain[1] / "checkpoints/step-000002")), tmp_path, listen)
    assert alive and not any(alive)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"training": {"learning_rate": 2e-3}}, "spec"),
        ({"lora": {"init": "pissa"}}, "spec"),
        ({"seed": 1}, "spec"),
        ({"data": {"training": "other"}}, "data"),
    ],
)
def test_checkpoint_of_another_recipe_is_refused(spec, plain, tmp_path, change, text):
    if "data" in change:
        change = {
            "data": {"training": str(write_rows(tmp_path / "o.jsonl", [chat(f"q{i}", "four") for i in range(12)]))}
        }
    with pytest.raises(CheckpointMismatch, match=f"{text} differ") as caught:
        go(spec(**change, resume_from=str(plain[1] / "checkpoints/step-000002")), tmp_path)
    assert caught.value.param == "resume_from"


def test_half_a_checkpoint_is_never_seen(spec, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(DiskFull):
        go(spec(), tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2  # flushed before the checkpoint


REFUSED = {
    "rank": ({"lora": {"r": 17, "target_modules": ["k_proj"]}}, RankTooLarge, "lora.r"),
    "target": ({"lora": {"target_modules": ["nope"]}}, UnknownTarget, "lora.target_modules[0]"),
    "length": (
        {"training": {"max_length": 512}}, SequenceTooLong, "training.max_length",
    ),
    "quantization": ({"lora": {"quantization": "nf4"}}, UnsupportedModel, "lora.quantization"),
    "masked": ({"training": {"max_length": 8}, "data": {"on_row_error": "skip"}}, NoTrainableTokens, "data.training"),
    "cut": ({"training": {"max_length": 16}}, LorainitError, "data.training"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_is_refused_before_training_with_its_field(spec, tmp_path, name):
    change, error, param = REFUSED[name]
    events = []
    with pytest.raises(error) as caught:
        run(spec(**change), tmp_path, events.append)
    assert caught.value.param == param
    assert not of(events, Metrics)


def test_bad_rows_fail_the_run_or_are_skipped(spec, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [*(chat(f"q{i}", "it is four") for i in range(9)), "{"])
    with pytest.raises(InvalidTrainingFile, match="Line 10"):
        go(spec(data={"training": str(path)}), tmp_path / "fail")
    events = go(spec(data={"training": str(path), "on_row_error": "skip"}), tmp_path / "skip")
    assert of(events, Plan)[0].rows == 9


def test_lines_of_all_bad_rows_are_told_before_the_run_ends(spec, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [chat("a", "b"), *(chat("<|im_end|>", "b") for _ in range(3))])
    events = []
    with pytest.raises(InvalidTrainingFile, match="special_token_in_text in 2, 3, 4"):
        run(spec(data={"training": str(path)}), tmp_path / "out", events.append)
    (told,) = [e.data["errors"] for e in of(events, Message) if "errors" in e.data]
    assert [(p["line"], p["code"]) for p in told] == [(n, "special_token_in_text") for n in (2, 3, 4)]


def test_answers_without_an_end_are_a_warning_of_the_run_that_append_eos_ends(spec, tmp_path, bases):
    base = tmp_path / "base"
    shutil.copytree(bases["llama"], base)
    (base / "generation_config.json").write_text('{"eos_token_id": 0}')
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|endoftext|>"}))

    def warned(**data):
        made, events = spec(model={"source": str(base)}, data=data), []
        prepared(made, tmp_path / "out", events.append)
        return [e.message for e in of(events, Message) if e.data.get("code") == "no_stop_token"]

    (message,) = warned()
    assert message.startswith("Line 1: the last answer ends with '<|im_end|>'")
    assert message.endswith("(12 rows of the training file)")
    assert warned(append_eos=True) == []


def test_whatever_on_event_raises_stops_the_run(spec, tmp_path):
    def stop(event):
        if isinstance(event, Tick):
            raise Stopped("enough")

    with pytest.raises(Stopped):
        run(spec(), tmp_path, stop)


def test_loss_that_is_not_finite_ends_the_run(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(adapter_trainer, "schedule", lambda *args, **kwargs: 1e30)
    with pytest.raises(NonFiniteLoss, match=r"^Step 2: .* learning rate"):
        go(spec(), tmp_path)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("can't allocate memory: 9")]
)
def test_running_out_of_memory_comes_with_advice(spec, tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(loop, "forward_backward", fail)
    with pytest.raises(OutOfMemory, match="max_length"):
        go(spec(), tmp_path)


def test_global_state_is_as_it_was(spec, tmp_path):
    state = torch.get_rng_state()
    go(spec(), tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()


def test_schedules():
    def shape(kind, total=10, warmup=2):
        return [schedule(kind, step, total=total, warmup=warmup) for step in range(total)]

    for kind in ("cosine", "linear", "constant"):
        assert shape(kind)[:3] == [0.5, 1.0, 1.0]
    assert shape("constant")[2:] == [1.0] * 8
    assert shape("linear")[6] == pytest.approx(0.5)
    assert shape("cosine")[6] == pytest.approx(0.5)
    assert shape("cosine")[9] == pytest.approx(0.038, abs=1e-3)
    assert schedule("cosine", 0, total=1, warmup=0) == 1.0


@pytest.mark.parametrize(
    ("init", "least", "most"),
    [
        ({"method": "lora_ga"}, 0.7, 1.3),
        ({"method": "lora_one", "gamma": 8192}, 0.7, 1.3),
        ({"method": "lora_one"}, 0.3, 1),
    ],
    ids=["lora_ga", "lora_one, hardly displaced", "lora_one"],
)
def test_first_step_changes_the_loss_as_the_report_expects(spec, tmp_path, init, least, most):
    """On the gradient's own rows, all in one batch. A displaced start has taken part of the way already."""
    training = {
        "max_steps": 2, "batch_size": 12, "learning_rate": 2e-5, "lr_scheduler": "constant", "warmup_ratio": 0.0,
    }  # fmt: skip
    events = []
    run(spec(lora={"init": {**init, "samples": 12}}, training=training), tmp_path, events.append)
    (report,) = of(events, InitReport)
    one, two = (m.train_loss for m in of(events, Metrics) if m.train_loss is not None)
    expected = report.report["expected_first_step_change"]
    assert expected < 0
    assert least < (two - one) / expected < most
