"""Before the first step: what does not fit into memory is found out and made to fit."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lorainit.config.errors import OutOfMemory
from lorainit.config.events import Checkpoint, Message, Metrics, Plan
from lorainit.context import RunRequest
from lorainit.data.dataset import Sample
from lorainit.run import run, run_together
from lorainit.train import memory
from tests.lorainit.conftest import chat, write_rows
from tests.lorainit.shortage import CHECKPOINTING, TOKENS, Memory, adapter, close, told

pytestmark = pytest.mark.usefixtures("training_only")


def test_a_batch_that_does_not_fit_is_cut_and_the_step_stays_what_it_was(wanted, tmp_path, monkeypatch):
    plain = run(wanted(), tmp_path / "plain", lambda event: None)
    memory, heard = Memory(monkeypatch, tokens=70), []
    cut = run(wanted(), tmp_path / "cut", heard.append)
    (fact,) = told(heard)
    assert fact["kind"] == "oom_retry"
    assert 30 < memory.largest <= fact[TOKENS] <= 70
    plans = [event.tokens_per_pass for event in heard if isinstance(event, Plan)]
    assert plans == [2048, fact[TOKENS]], "what will run is told again"
    assert (cut.resources["oom_retries"], cut.resources[TOKENS]) == (1, fact[TOKENS])
    assert plain.resources["gradient_accumulation_steps"] == 1 < cut.resources["gradient_accumulation_steps"] <= 4
    manifest = json.loads((Path(cut.adapter) / "manifest.json").read_text())
    assert manifest["plan"][TOKENS] == fact[TOKENS]
    assert close(adapter(cut), adapter(plain))


@pytest.mark.parametrize("length", [5, 700, 1023, 1025, 5000])
@pytest.mark.parametrize("members", [1, 3])
def test_of_two_passes_that_are_measured_one_has_about_twice_the_tokens(length, members):
    """Else the difference between them would be the allocator's rounding and not what tokens take."""
    row = Sample(1, list(range(length)), torch.ones(length, dtype=torch.bool))
    member = SimpleNamespace(data=SimpleNamespace(samples=[row]))
    small, large = (
        sum(len(s.ids) for s in memory._make_long_rows(member, tokens // members, memory.PROBED // 2 // members))
        for tokens in (memory.PROBED // 2, memory.PROBED)
    )
    assert 1.8 * small <= large <= 3 * small <= 3 * memory.PROBED // 2


def test_validation_that_does_not_fit_is_cut_before_the_first_step(wanted, tmp_path, monkeypatch):
    """Its rows may be longer than those of training, and it was not tried once: what it takes came as a surprise."""
    rows = write_rows(tmp_path / "valid.jsonl", [chat(f"q{i}", "one two three " * 8) for i in range(5)])
    plain = run(wanted(data={"validation": str(rows)}), tmp_path / "plain", lambda event: None)
    Memory(monkeypatch, looking=200)
    heard = []
    cut = run(wanted(data={"validation": str(rows)}), tmp_path / "cut", heard.append)
    (fact,) = told(heard)
    first = next(n for n, event in enumerate(heard) if isinstance(event, Metrics))
    assert fact[TOKENS] <= 200
    assert [e.data for e in heard[:first] if isinstance(e, Message)][-1] == fact
    assert close(adapter(cut), adapter(plain))


def test_a_run_that_goes_on_keeps_its_passes_and_gives_the_same_bits(wanted, tmp_path, monkeypatch):
    training = {"batch_size": 4, "checkpoint_interval": 2}
    memory, heard = Memory(monkeypatch, tokens=70), []
    whole = run(wanted(training=training), tmp_path / "whole", heard.append)
    point = next(event for event in heard if isinstance(event, Checkpoint))
    memory.limit = 10_000
    rest = run(wanted(training=training, resume_from=point.path), tmp_path / "rest", lambda event: None)
    assert rest.resources[TOKENS] == whole.resources[TOKENS] <= 70
    assert all(torch.equal(tensor, adapter(whole)[name]) for name, tensor in adapter(rest).items())


def test_a_run_that_goes_on_computes_layers_again_if_it_had_to(wanted, tmp_path, monkeypatch):
    training = {"batch_size": 4, "checkpoint_interval": 2}
    Memory(monkeypatch, tokens=4, recomputed=70)
    lora, heard = {"init": "kaiming", "dropout": 0.2}, []
    whole = run(wanted(training=training, lora=lora), tmp_path / "whole", lambda event: None)
    point = tmp_path / "whole/checkpoints/step-000002"
    rest = run(wanted(training=training, lora=lora, resume_from=str(point)), tmp_path / "rest", heard.append)
    assert told(heard) == [{"kind": "machine", CHECKPOINTING: True}]
    assert rest.resources[TOKENS] == whole.resources[TOKENS]
    assert all(torch.equal(tensor, adapter(whole)[name]) for name, tensor in adapter(rest).items())


def test_gradient_checkpointing_is_the_last_resort(wanted, tmp_path, monkeypatch):
    plain = run(wanted(micro_batch_size=1), tmp_path / "plain", lambda event: None)
    Memory(monkeypatch, tokens=4, recomputed=70)
    heard = []
    done = run(wanted(), tmp_path / "again", heard.append)
    *smaller, none = [fact.get(TOKENS) for fact in told(heard)]
    assert smaller == sorted(smaller, reverse=True)
    assert len(smaller) >= 2
    assert none is None
    assert told(heard)[-1] == {"kind": "oom_retry", CHECKPOINTING: True}
    ours, theirs = adapter(done), adapter(plain)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("switch", [False, "auto"])
def test_what_cannot_fit_is_out_of_memory_with_advice(wanted, tmp_path, monkeypatch, switch):
    Memory(monkeypatch, tokens=4, recomputed=70 if switch is False else 4)
    heard = []
    with pytest.raises(OutOfMemory, match="max_length") as error:
        run(wanted(training={CHECKPOINTING: switch, "batch_size": 4}), tmp_path / "out", heard.append)
    assert error.value.param == "training.max_length"
    assert not [event for event in heard if isinstance(event, Metrics) and event.train_loss]


def test_any_other_failure_of_the_trial_is_itself(wanted, tmp_path, monkeypatch):
    memory = Memory(monkeypatch, tokens=70)
    # The proof before it makes no gradients.
    memory.allocate = lambda *_, **__: torch.is_grad_enabled() and torch.zeros(2) @ torch.zeros(3)
    with pytest.raises(RuntimeError, match="inconsistent tensor"):
        run(wanted(), tmp_path / "out", lambda event: None)


def test_members_of_a_group_get_smaller_together(wanted, tmp_path, monkeypatch):
    specs = [wanted(seed=seed) for seed in (1, 2)]
    plain = [adapter(run(one, tmp_path / f"{i}", lambda event: None)) for i, one in enumerate(specs)]
    Memory(monkeypatch, tokens=160)
    heard = [[], []]
    requests = [RunRequest(one, tmp_path / f"g{i}", heard[i].append) for i, one in enumerate(specs)]
    ends = dict(run_together(requests))
    for i in (0, 1):
        assert told(heard[i])[-1][TOKENS] <= 80
        assert close(adapter(ends[i]), plain[i])


def test_an_update_that_does_not_fit_is_out_of_memory_before_any_pass(wanted, tmp_path, monkeypatch):
    """Smaller passes would not help."""

    def short(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    memory, heard = Memory(monkeypatch), []
    monkeypatch.setattr(torch.optim.AdamW, "step", short)
    with pytest.raises(OutOfMemory, match="update of the adapter") as error:
        run(wanted(lora={"init": "kaiming"}), tmp_path / "out", heard.append)
    assert error.value.param == "lora.r"
    assert not memory.largest
    assert not told(heard)
