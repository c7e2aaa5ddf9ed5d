"""A run that ends with a validation loss above the untouched base's says so, with the numbers and what to try."""

import io
import json

import pytest
from rich.console import Console

from lorainit.config.events import Done, Message
from lorainit.export.outcome import find_warnings
from lorainit.progress import ProgressDisplay
from lorainit.run import run
from lorainit.train import adapter_trainer

pytestmark = pytest.mark.usefixtures("training_only")


def log(path, losses):
    rows = [{"step": step, "full_valid_loss": loss} for step, loss in losses.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def done_of(spec, out, events):
    run(spec(data={"validation": spec().data.training}), out, events.append)
    return next(event for event in events if isinstance(event, Done))


def test_run_that_makes_the_model_worse_ends_with_a_warning_of_both_losses(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(adapter_trainer, "schedule", lambda *args, **kwargs: -1.0)  # uphill
    events = []
    (found,) = done_of(spec, tmp_path, events).warnings
    steps = [json.loads(line)["full_valid_loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    numbers = {"base": steps[0], "start": steps[0], "end": steps[-1], "learning_rate": 2e-4}
    assert (found.code, found.data) == ("worse_than_base", numbers)
    (said,) = [e for e in events if isinstance(e, Message) and e.data.get("kind") == "worse_than_base"]
    assert (said.level, said.message) == ("warn", found.message)
    assert f"{steps[0]:.4f}" in said.message and f"{steps[-1]:.4f}" in said.message


def test_displaced_start_knows_the_untouched_bases_loss_on_the_validation_rows(spec, tmp_path):
    validation, logs = {"validation": spec().data.training}, dict[str, list[float]]()
    for method in ("kaiming", "lora_one"):
        run(spec(data=validation, lora={"init": method}), tmp_path / method, lambda _: None)
        rows = map(json.loads, (tmp_path / method / "metrics.jsonl").read_text().splitlines())
        logs[method] = [row["full_valid_loss"] for row in rows]
    reports = {m: json.loads((tmp_path / m / "adapter" / "init_report.json").read_text()) for m in logs}
    assert reports["kaiming"]["base_valid_loss"] is None
    assert reports["lora_one"]["base_valid_loss"] == pytest.approx(logs["kaiming"][0], abs=1e-5)
    assert abs(logs["lora_one"][0] - logs["kaiming"][0]) > 1e-3  # it is displaced indeed


@pytest.mark.parametrize(
    ("base", "start", "end", "code"),
    [
        (2.0, 2.5, 2.2, "worse_than_base"),  # better than its start all the same
        (2.0, 1.5, 2.2, "worse_than_base"),
        (2.0, 1.5, 1.7, "worse_than_start"),
        (2.0, 2.5, 1.9, None),
    ],
)
def test_the_end_is_compared_with_the_untouched_base_and_with_the_start(base, start, end, code, tmp_path):
    found = find_warnings(log(tmp_path / "log", {0: start, 8: end}), rate=1e-3, usual=1e-3, base=base)
    assert [one.code for one in found] == ([code] if code else [])
    for one in found:
        assert one.data == {"base": base, "start": start, "end": end, "learning_rate": 2e-4}
        assert all(f"{loss:.4f}" in one.message for loss in (base, start, end))


def test_run_that_leaves_the_model_as_it_was_ends_with_a_warning(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(adapter_trainer, "schedule", lambda *args, **kwargs: 0.0)  # as while it warms up from zero
    events = []
    done = done_of(spec, tmp_path, events)
    assert [(found.code, found.data) for found in done.warnings] == [("no_effect", {"effect": 0.0})]
    assert (done.export_check["passed"], done.export_check["without_effect"]) == (True, True)
    (said,) = [e for e in events if isinstance(e, Message) and e.data.get("kind") == "no_effect"]
    assert said.level == "warn" and said.message.startswith("The adapter does nothing")


def test_run_that_makes_the_model_better_ends_without_a_warning(spec, tmp_path):
    assert done_of(spec, tmp_path, []).warnings == []


@pytest.mark.parametrize("losses", [{}, {0: 2.0}, {0: 2.0, 4: None}, {0: 2.0, 4: 2.0}, {4: 2.0, 8: 3.0}])
def test_log_without_two_losses_to_compare_is_no_verdict(losses, tmp_path):
    assert find_warnings(log(tmp_path / "log", losses), rate=1e-3, usual=1e-3) == []


def test_run_that_was_better_on_its_way_is_told_where(tmp_path):
    (found,) = find_warnings(log(tmp_path / "log", {0: 2.0, 4: 1.5, 8: 2.5}), rate=1e-3, usual=1e-3)
    assert "learning_rate 0.0002, a fifth" in found.message and "or 4 steps, where the loss was 1.5000" in found.message


@pytest.mark.parametrize(
    ("rate", "advised", "why"),
    [
        (0.3, 1e-3, "the default of this base and initialization, instead of this run's 0.3"),
        (4e-3, 8e-4, "a fifth of this run's 0.004"),
        (1e-3, 2e-4, "a fifth of this run's 0.001"),
        (1e-4, 2e-5, "a fifth of this run's 0.0001"),
    ],
)
def test_the_advised_rate_is_never_above_the_default(rate, advised, why, tmp_path):
    (found,) = find_warnings(log(tmp_path / "log", {0: 2.0, 8: 2.5}), rate=rate, usual=1e-3)
    assert found.data["learning_rate"] == advised
    assert f"Try learning_rate {advised:g}, {why}." in found.message


def test_run_at_a_rate_far_above_its_default_is_told_the_default(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(adapter_trainer, "schedule", lambda *args, **kwargs: -1e-3)  # uphill
    training = {"learning_rate": 0.3}
    events = []
    run(spec(data={"validation": spec().data.training}, training=training), tmp_path, events.append)
    (found,) = next(event for event in events if isinstance(event, Done)).warnings
    assert found.data["learning_rate"] == 2e-4  # `loram` on a base of this size, docs/rates.md


def test_the_last_line_of_the_command_line_is_the_warning(tmp_path):
    warnings = find_warnings(log(tmp_path / "log", {0: 2.0, 8: 2.5}), rate=1e-3, usual=1e-3)
    check = {"loaders": [{"version": "0"}], "max_abs_logit_difference": 0.0}
    done = Done(adapter="x", trained_tokens=1, export_check=check, resources={}, warnings=warnings)
    shown = io.StringIO()
    display = ProgressDisplay(Console(file=shown, width=400))
    display.show(done)
    display.conclude()
    assert shown.getvalue().splitlines()[-1].startswith("worse_than_base: The validation loss ended at 2.5")
